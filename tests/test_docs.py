"""Every `vtp` command that the README and the documentation print is one that the command line takes."""

import argparse
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


def test_no_argument_hides_the_function_of_its_command():
    commands = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    pending = list(commands.choices.values())
    while pending:
        command = pending.pop()
        nested = [a for a in command._actions if isinstance(a, argparse._SubParsersAction)]
        pending += [sub for action in nested for sub in action.choices.values()]
        assert "run" not in {action.dest for action in command._actions}, command.prog
