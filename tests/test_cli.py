"""What the command line makes of outputs that cannot be written: one line that names the place, for every command."""

import argparse
import errno

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torch.distributed import DistNetworkError

from tests.tiny import save_tokenizer
from vtp.cli import _parser, main

EVAL = ["TOKENIZER", "--data", "scenes:test", "--limit", "9", "--device", "cpu", "--out", "OUT"]
PROBE = [*EVAL, "--train-data", "scenes", "--label", "shape"]
COMMANDS = {
    "quickstart": ["--out", "OUT"],
    "pretrain": ["quickstart", "out=OUT"],
    "profile": ["quickstart", "--out", "OUT"],
    "data inspect": ["PICTURES", "--out", "OUT"],
    "data pack": ["PICTURES", "--out", "OUT", "--workers", "1"],
    "eval zero-shot": [*EVAL, "--label", "shape"],
    "eval linear": PROBE,
    "eval knn": PROBE,
    "eval reconstruction": EVAL,
    "eval generation": ["PICTURES", "--reference", "PICTURES", "--extractor", "EXTRACTOR", "--out", "OUT"],
    "reconstruct": ["TOKENIZER", "PICTURES", "--device", "cpu", "--out", "OUT"],
    "compare": EVAL,
    "latents": [*EVAL, "--label", "shape"],
    "export": ["TOKENIZER", "--out", "OUT"],
    "report": ["RUN", "--out", "OUT"],
}
# Their inputs take a training run: `convert` is in models/test_legacy.py, the others in generation/test_sample.py.
ELSEWHERE = {"convert", "train-dit", "sample"}
NO_OUTPUT = {"publish"}  # it writes into the tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    from vtp.data.sources import open_source
    from vtp.evaluation.judge import save_judge, train_judge

    root = tmp_path_factory.mktemp("inputs")
    save_tokenizer(root / "run/tokenizer")
    (root / "pictures").mkdir()
    for i in range(8):
        Image.effect_noise((16, 16), i).convert("RGB").save(root / f"pictures/{i}.png")
    save_judge(train_judge(open_source("scenes"), ("shape",), size=16, images=64, epochs=1, width=4), root / "judge")
    return {
        "TOKENIZER": str(root / "run/tokenizer"),
        "PICTURES": str(root / "pictures"),
        "RUN": str(root / "run"),
        "EXTRACTOR": f"judge:{root / 'judge'}",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_below_a_file_is_one_line(command, inputs, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    out = str(tmp_path / "file/out")
    words = [inputs.get(word, word).replace("OUT", out) for word in COMMANDS[command]]
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), *words])
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("vtp: ")]
    assert stop.value.code == 2 and len(said) == 1
    assert str(tmp_path / "file") in said[0] and said[0].endswith(("Not a directory", "File exists"))
    assert (tmp_path / "file").read_text() == "in the way"


def test_no_command_is_left_out():
    def names(parser, before=""):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, sub in action.choices.items():
                    yield from names(sub, f"{before}{name} ")
                return
        yield before.strip()

    assert set(names(_parser())) == COMMANDS.keys() | ELSEWHERE | NO_OUTPUT


@pytest.mark.parametrize("command", ["export", "eval reconstruction", "report", "data pack"])
def test_no_room_or_permission_is_one_line(command, inputs, tmp_path, monkeypatch, capsys):
    """/dev/full and folders without permission are not everywhere; a mkdir and an open that refuse are."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    words = [inputs.get(word, word).replace("OUT", str(tmp_path / "a/b")) for word in COMMANDS[command]]
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), *words])
    assert stop.value.code == 2
    assert f"vtp: {tmp_path / 'a'}" in (said := capsys.readouterr().err) and "Permission denied\n" in said


def test_an_error_that_is_about_no_file_is_not_hidden(inputs, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("a socket was closed")

    monkeypatch.setattr("vtp.models.export.export", broken)
    with pytest.raises(OSError, match="a socket"):
        main(["export", inputs["TOKENIZER"], "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "error, line",
    [
        (  # as a write fails, without a name
            OSError(errno.ENOSPC, "No space left on device"),
            "vtp: No space left on device while writing; make room and try again",
        ),
        (SafetensorError("I/O error: No space left on device"), "vtp: I/O error: No space left on device"),
    ],
)
def test_a_full_disk_is_one_line(error, line, inputs, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr("vtp.models.export.export", broken)
    with pytest.raises(SystemExit) as stop:
        main(["export", inputs["TOKENIZER"], "--out", str(tmp_path)])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said[-1] == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:1427"),
            "vtp (rank 1): another rank has ended",
        ),
        (
            DistNetworkError("Broken pipe\nException raised from sendBytes"),
            "vtp (rank 1): the ranks do not meet, or one",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "vtp (rank 1): DataLoader worker (pid 7) is killed by signal: Killed; for want",
        ),
        (
            RuntimeError("InvalidCxxCompiler: No working C++ compiler found in cpp.cxx: (None, 'g++')\n\nSet TORCH"),
            "vtp (rank 1): torch.compile finds no C++ compiler (Invalid",
        ),
        (RuntimeError("something of ours"), None),
    ],
)
def test_what_ended_elsewhere_is_one_line(error, line, inputs, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("vtp.models.export.export", broken)
    with pytest.raises(SystemExit if line else RuntimeError):
        main(["export", inputs["TOKENIZER"], "--out", str(tmp_path)])
    said = capsys.readouterr().err.strip().splitlines()
    assert line is None or said[-1].startswith(line)


def test_too_little_memory_is_one_line(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vtp.models.export.export", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(SystemExit) as stop:
        main(["export", inputs["TOKENIZER"], "--out", str(tmp_path)])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "allocate" in said and "a smaller batch" in said
