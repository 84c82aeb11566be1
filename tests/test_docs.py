"""Every `vtp` command that the README and the documentation print is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

from vtp.cli import _parser, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^(?:    |`)(?:\S*bin/|torchrun .*-m )?vtp (\S.*?)(?:`| # |$)", re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "command"), [(page.name, found.strip()) for page in PAGES for found in COMMAND.findall(page.read_text())]
)
def test_printed_commands_parse(page, command, capsys):
    words = shlex.split(command)
    if words[0] in ("pretrain", "train-dit") and not words[1].endswith(".yaml"):
        main([*words, *([] if "--dry-run" in words else ["--dry-run"])])
        assert "optim:" in capsys.readouterr().out
    else:
        _parser().parse_args(words)
