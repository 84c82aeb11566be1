"""Exported programs agree with the model at sizes and batches which they were not traced at."""

import json
import subprocess
import sys

import jaxtyping
import onnxruntime
import pytest
import torch

from tests.models.test_vtp_hf import small
from vtp.cli import main
from vtp.config import ConfigError
from vtp.files import file_sha256
from vtp.models.export import export
from vtp.models.latent_stats import ChannelStats, read_stats, write_stats
from vtp.models.published import published_stats
from vtp.models.vtp_hf import VTPModel

# torch's own reader of .pt2 files sees weights as bytes that it must not write to
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")

# Traced with 2 images of 4 x 6 patches, and 2 texts of 8 tokens; (batch, rows, columns) and (batch, tokens) here.
GRIDS = [(1, 4, 4), (3, 5, 3), (2, 2, 9)]
TEXTS = [(1, 8), (3, 5)]


@pytest.fixture(scope="module", autouse=True)
def no_shape_checks():
    """While sizes are symbols, they are not the integers that annotations speak of."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def published(folder, **changes):
    small(vision_depth=1, text_depth=1, decoder_depth=1, **changes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenizer with exact rotations and statistics, and what the command makes of it."""
    folder, out = (tmp_path_factory.mktemp(name) for name in ("tokenizer", "exported"))
    published(folder, rope_dtype="fp32")
    sha256 = file_sha256(folder / "model.safetensors")
    mean, std = (0.0,) * 8, (1.0,) * 8
    write_stats(folder, ChannelStats(mean=mean, std=std, count=1, size=16, data="photos", tokenizer_sha256=sha256))
    main(["export", str(folder), "--out", str(out)])
    return folder, out


def inputs(name, patch=4, channels=8):
    generator = torch.Generator().manual_seed(0)
    if name == "clip_text":
        return [torch.randint(1, 50, size, generator=generator) for size in TEXTS]
    if name == "decoder":
        return [torch.randn(b, channels, h, w, generator=generator) for b, h, w in GRIDS]
    return [torch.randn(b, 3, patch * h, patch * w, generator=generator) for b, h, w in GRIDS]


METHODS = {
    "encoder": "get_reconstruction_latents",
    "decoder": "get_latents_decoded_images",
    "clip_image": "get_clip_image_feature",
    "clip_text": "get_clip_text_feature",
}


@torch.no_grad()
def compare(files, run, model, atol):
    for file in files:
        program = run(file)
        for x in inputs(file.stem):
            torch.testing.assert_close(program(x), getattr(model, METHODS[file.stem])(x), atol=atol, rtol=0)


def torch_program(file):
    return torch.export.load(file).module()


def onnx_program(file):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


def test_torch_programs_with_exact_rotations(folders):
    """The same kernels in another order: the last bits of float32."""
    folder, out = folders
    assert {file.stem for file in out.glob("*.pt2")} == METHODS.keys()
    compare(sorted(out.glob("*.pt2")), torch_program, VTPModel.from_pretrained(folder), 1e-5)


def test_torch_programs_with_published_rotations(tmp_path):
    """Rotations in bfloat16 turn last bits of float32 into some 1e-2, within one model from batch to batch as well."""
    folder = published(tmp_path / "tokenizer", train_clip=False)
    files = export(folder, tmp_path / "out")
    assert [file.name for file in files] == ["encoder.pt2", "decoder.pt2"]
    compare(files, torch_program, VTPModel.from_pretrained(folder), 2e-2)
    assert "bfloat16" in str(torch.export.load(files[0]).graph)


def test_onnx_programs(tmp_path):
    """Other kernels: sums in another order, some 1e-7 for values around 1 (measured: at most 2.1e-7)."""
    folder = published(tmp_path / "tokenizer")
    files = export(folder, tmp_path / "out", "onnx")
    assert {file.name for file in files} == {f"{name}.onnx" for name in METHODS}
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_dtype"] == "fp32"
    compare(files, onnx_program, VTPModel.from_pretrained(folder, rope_dtype="fp32"), 1e-5)
    encoder = onnxruntime.InferenceSession(files[0], providers=["CPUExecutionProvider"])
    assert encoder.get_inputs()[0].shape == ["batch", 3, "4*rows", "4*columns"]
    assert encoder.get_outputs()[0].shape[2:] == ["rows", "columns"]


def test_a_program_holds_the_weights_it_reads_and_no_others(folders):
    folder, out = folders
    model = VTPModel.from_pretrained(folder)
    for name, parts in {"encoder": ("trunk.",), "decoder": ("pixel_decoder.",)}.items():
        held = {key.removeprefix("model.") for key in torch.export.load(out / f"{name}.pt2").state_dict}
        assert held == {key for key in model.state_dict() if key.startswith(parts)}


def test_statistics_go_along(folders):
    folder, out = folders
    assert read_stats(out / "latent_stats.json") == published_stats(folder)


def test_programs_run_without_this_package(folders):
    program = (
        "import sys, torch\n"
        "encode, decode = (torch.export.load(f'{name}.pt2').module() for name in ('encoder', 'decoder'))\n"
        "print(tuple(decode(encode(torch.zeros(5, 3, 20, 24))).shape))\n"
        "assert 'vtp' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folders[1])
    assert done.stdout == "(5, 3, 20, 24)\n", done.stderr


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no tokenizer in"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="format=coreml: choose torch, onnx"):
        export(tmp_path, tmp_path / "out", "coreml")
    monkeypatch.setattr("vtp.models.export.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnx and onnxscript: pip install 'vtp\[onnx\]'"):
        export(tmp_path, tmp_path / "out", "onnx")


def test_positions_of_patch_centres():
    """Tables of a traced grid are those of a fixed one, bit for bit."""
    from vtp.models.rope import rope_tables

    for dtype in (torch.bfloat16, torch.float32):
        for size in (1, 2, 3, 16, 100, 129, 300):
            published = torch.arange(0.5, size, dtype=dtype) / size
            cos, _ = rope_tables(4, (size, 1), dtype, torch.device("cpu"))
            expected = (2 * torch.pi * (2 * published - 1)).cos()
            assert torch.equal(cos[:, 0], expected)
