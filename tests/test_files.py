import hashlib

from vtp.files import file_sha256


def test_hash_of_a_file_read_in_several_blocks(tmp_path):
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
