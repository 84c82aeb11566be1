import pytest

from tests.tiny import save_tokenizer
from vtp.generation.config import DiTSize, DiTTrainConfig
from vtp.generation.latents import encode_latents


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A published tokenizer folder: untrained, 16 px, patch 8, 6 channels."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), width=16, channels=6, train_clip=False)


@pytest.fixture(scope="session")
def latents(tokenizer, tmp_path_factory):
    """Latents of 40 scenes that show one kind of shape, in three files."""
    out = tmp_path_factory.mktemp("latents")
    return encode_latents(tokenizer, "scenes", out, label="shape", limit=40, batch_size=7, shard_size=16, device="cpu")


@pytest.fixture
def tiny(latents, tmp_path):
    """A run of five steps."""
    return DiTTrainConfig(
        data=str(latents),
        out=str(tmp_path / "run"),
        steps=5,
        device="cpu",
        precision="fp32",
        batch_size=6,
        model=DiTSize(hidden_size=16, depth=1, num_heads=2),
    )
