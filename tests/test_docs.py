"""Every `vtp` command that the README and the documentation print is one that the command line takes, and the Python
of the page about other tools runs as it stands."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vtp.cli import _parser, main
from vtp.models.config import DecoderConfig, ModelConfig, TextConfig, ViTConfig
from vtp.models.vtp_hf import VTPConfig, VTPModel

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^(?:    |`)(?:\S*bin/|torchrun .*-m )?vtp (\S.*?)(?:`| # |$)", re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "command"), [(page.name, found.strip()) for page in PAGES for found in COMMAND.findall(page.read_text())]
)
def test_printed_commands_parse(page, command, capsys):
    words = shlex.split(command)
    if words[0] in ("pretrain", "profile", "train-dit") and not words[1].endswith(".yaml"):
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


def test_python_about_other_tools_runs(tmp_path):
    """In a process of its own: while programs are exported sizes are symbols, and here annotations are checked."""
    torch.manual_seed(0)
    tiny = ModelConfig(
        image_size=16,
        vision=ViTConfig(patch_size=8, embed_dim=16, depth=1, num_heads=2, feature_bottleneck=4),
        text=TextConfig(context_length=8, vocab_size=50, embed_dim=16, depth=1, num_heads=2),
        decoder=DecoderConfig(embed_dim=16, depth=1, num_heads=2),
    )
    VTPModel(VTPConfig.from_model_config(tiny)).save_pretrained(tmp_path / "runs/quickstart/vtp/tokenizer")
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/ecosystem.md").read_text(), re.DOTALL)
    (tmp_path / "page.py").write_text("\n".join(code))
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"16 \d+\nnot measured\ntorch.Size\(\[5, 4, 8, 4\]\)\n", done.stdout)
