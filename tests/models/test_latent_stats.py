import json

import pytest
import torch

from vtp.config import ConfigError
from vtp.models.latent_stats import ChannelStats, read_stats, write_stats

STATS = ChannelStats(mean=(0.5, -2.0), std=(2.0, 0.25), count=7, size=32, data="photos", tokenizer_sha256="ab")


def test_round_trip_through_a_published_folder(tmp_path):
    write_stats(tmp_path, STATS)
    assert read_stats(tmp_path / "latent_stats.json") == STATS


def test_more_keys_than_these_are_passed_over(tmp_path):
    """As in the stats.json of `vtp latents`."""
    write_stats(tmp_path, STATS)
    saved = json.loads((tmp_path / "latent_stats.json").read_text())
    (tmp_path / "stats.json").write_text(json.dumps(saved | {"flip": True, "classes": ["a"]}))
    assert read_stats(tmp_path / "stats.json") == STATS


def test_the_published_form(tmp_path):
    mean, std = torch.tensor([[0.5], [-2.0]])[None, ..., None], torch.tensor([[2.0], [0.25]])[None, ..., None]
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    stats = read_stats(tmp_path / "latents_stats.pt")
    assert (stats.mean, stats.std) == (STATS.mean, STATS.std)
    assert (stats.count, stats.size, stats.data, stats.tokenizer_sha256) == (None, None, None, None)
    latents = torch.randn(3, 2, 4, 5)
    torch.testing.assert_close(stats.normalise(latents), (latents - mean) / std)
    torch.testing.assert_close(stats.denormalise(stats.normalise(latents)), latents)


def test_overall_moments_are_those_of_all_numbers():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 3, 5, 6, generator=generator).double() * torch.tensor([1.0, 2.0, 0.1])[:, None, None]
    latents += torch.tensor([3.0, 0.0, -1.0])[:, None, None]
    by_channel = latents.transpose(0, 1).flatten(1)
    stats = ChannelStats(
        mean=tuple(by_channel.mean(1).tolist()),
        std=tuple(by_channel.std(1, correction=0).tolist()),
        count=4,
        size=None,
        data=None,
        tokenizer_sha256=None,
    )
    mean, std = stats.overall
    assert mean == pytest.approx(latents.mean().item()) and std == pytest.approx(latents.std(correction=0).item())


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no latent statistics at .*vtp latents"):
        read_stats(tmp_path / "latent_stats.json")
    (tmp_path / "a.json").write_text('{"mean": [0.0], "std": [1.0]}')
    with pytest.raises(ConfigError, match="a.json does not describe latents: 'count'"):
        read_stats(tmp_path / "a.json")
    (tmp_path / "b.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r'b.pt is no published \{"mean", "std"\}'):
        read_stats(tmp_path / "b.pt")
    for mean, std in (((0.0,), (1.0, 1.0)), ((float("nan"),), (1.0,)), ((0.0,), (-1.0,))):
        with pytest.raises(ConfigError, match="one finite number of each"):
            ChannelStats(mean=mean, std=std, count=None, size=None, data=None, tokenizer_sha256=None)
