"""What training learns from in one step, and how pairs become it. Images are bytes until `augment.finish`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from vtp.data.masks import block_masks, targets
from vtp.data.order import Cursor
from vtp.data.samples import Raw
from vtp.data.views import BatchConfig, ViewsConfig, caption_span, make

Tokenizer = Callable[[list[str]], Tensor]


TEXT_GROUP, TEXT_GROUPS = 8, 8  # captions at least, groups at most


class ClipBatch(NamedTuple):
    images: Tensor  # [Bc, 3, H, W]
    tokens: Tensor  # [Bc, L] int64, L that of the longest caption of the batch
    lengths: tuple[int, ...] = ()  # tokens of each caption, known to the host; none: all are L long

    def part(self, first: int, last: int) -> ClipBatch:
        """Pairs `first` to `last`."""
        return ClipBatch(self.images[first:last], self.tokens[first:last], self.lengths[first:last])

    def texts(self) -> list[Tensor]:
        """The captions in groups of neighbours [Bc / groups, l], each cut to its longest: `build` puts long ones
        together, so that little padding is left to compute."""
        if not self.lengths:
            return [self.tokens]
        groups = self.tokens.chunk(min(max(1, len(self.tokens) // TEXT_GROUP), TEXT_GROUPS))
        ends = itertools.accumulate(map(len, groups))
        return [group[:, : max(self.lengths[end - len(group) : end])] for group, end in zip(groups, ends, strict=True)]


class SSLBatch(NamedTuple):
    global_crops: Tensor  # [2, Bs, 3, G, G]
    local_crops: Tensor  # [n, Bs, 3, S, S]
    masks: Tensor  # [2, Bs, N] bool, True where the student sees the mask token
    mask_indices: Tensor  # [M] int64, the True positions of masks.flatten()
    mask_weights: Tensor  # [M] float32, 1 / (masked patches of that crop)


class RecBatch(NamedTuple):
    images: Tensor  # [Br, 3, H, W]; empty until `finish` where they are CLIP views
    shared: int  # the CLIP views that they are, counted from the first; 0 where they are views of their own


class Batch(NamedTuple):
    """Views of one draw of pairs. Images are bytes until `augment.finish` makes them normalised floats."""

    clip: ClipBatch | None
    ssl: SSLBatch | None
    rec: RecBatch | None
    cursor: Cursor
    report: dict[str, int]  # of the worker so far: "samples" seen, and skipped ones by reason

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; the copy does not wait where memory is pinned."""

        def moved(part: Any) -> Any:
            if part is None:
                return None
            return type(part)(*(t.to(device, non_blocking=True) if isinstance(t, Tensor) else t for t in part))

        return self._replace(clip=moved(self.clip), ssl=moved(self.ssl), rec=moved(self.rec))


def build(
    pairs: Mapping[str, tuple[list[Raw], list[ndarray]]],
    views: ViewsConfig,
    batch: BatchConfig,
    tokenizer: Tokenizer | None,
    patch_size: int,
    rng: np.random.Generator,
) -> tuple[ClipBatch | None, SSLBatch | None, RecBatch | None]:
    """The views of the pairs drawn for each objective."""
    clip, ssl, rec, shared = None, None, None, 0
    if batch.clip:
        raws, images = pairs["clip"]
        rows = _draw(len(images), batch.clip, rng)
        texts = [raws[i].captions[int(rng.integers(len(raws[i].captions)))] for i in rows]
        if views.caption_spans > 0:
            texts = [caption_span(text, rng) if rng.random() < views.caption_spans else text for text in texts]
        assert tokenizer is not None
        tokens = tokenizer(texts)
        lengths = token_counts(tokens)
        shared = batch.rec if views.share and pairs.get("rec") is pairs["clip"] else 0
        apart = np.isin(np.arange(batch.clip), _draw(batch.clip, shared, rng), invert=True)  # not reconstructed
        order = np.lexsort((lengths, apart))
        pictures = make([images[i] for i in rows[order]], views.size, views.scale, views.flip, rng)[0]
        clip = ClipBatch(pictures, cut(tokens[torch.from_numpy(order)]), tuple(lengths[order].tolist()))
    if clip is not None and shared:
        rec = RecBatch(clip.images[:0], shared)
    elif batch.rec:
        images = pairs["rec"][1]
        rows = _draw(len(images), batch.rec, rng)
        scale = views.scale if views.share else views.rec_scale
        rec = RecBatch(make([images[i] for i in rows], views.size, scale, views.flip, rng)[0], 0)
    if batch.ssl:
        images = pairs["ssl"][1]
        chosen = [images[i] for i in _draw(len(images), batch.ssl, rng)]
        global_crops = make(chosen, views.global_size, views.global_scale, views.ssl_flip, rng, 2)
        local_crops = make(chosen, views.local_size, views.local_scale, views.ssl_flip, rng, views.local_crops)
        side = views.global_size // patch_size
        masks = block_masks(2 * batch.ssl, (side, side), views.mask_probability, views.mask_ratio, rng)
        indices, weights = (torch.from_numpy(a) for a in targets(masks))
        masks_ = torch.from_numpy(masks).view(2, batch.ssl, side * side)
        ssl = SSLBatch(global_crops, local_crops, masks_, indices, weights)
    return clip, ssl, rec


def _draw(n: int, k: int, rng: np.random.Generator) -> Int[ndarray, " k"]:
    """k of n rows, in order; all of them without a draw."""
    return np.arange(n) if k == n else np.sort(rng.permutation(n)[:k])


def token_counts(tokens: Int[Tensor, "b context"]) -> Int[ndarray, " b"]:
    """Tokens of each caption up to its last one that is not padding."""
    return ((tokens != 0).cumsum(1).argmax(1) + 1).numpy()


def cut(tokens: Int[Tensor, "b context"]) -> Int[Tensor, "b length"]:
    """Cut the padding that every row has: a causal text tower that pools at the end token never needs it."""
    return tokens[:, : int((tokens != 0).any(0).nonzero().max()) + 1].contiguous()
