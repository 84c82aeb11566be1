"""A small set in tar shards."""

import pytest

from tests.data.test_sources import picture, write_tar
from vtp.data.sources import open_source


@pytest.fixture
def shards(tmp_path):
    """Ten shards of seven captioned pictures."""
    for s in range(10):
        members = [
            (f"{s}_{i}.{e}", d) for i in range(7) for e, d in (("jpg", picture(i)), ("txt", b"%d of %d" % (i, s)))
        ]
        write_tar(tmp_path / f"{s}.tar", members)
    return open_source(str(tmp_path))
