"""What a step costs on paper: floating-point operations of its matrix products, from the shapes of its batch."""

from __future__ import annotations

from typing import cast

from torch import nn

from vtp.data.batches import Batch
from vtp.models.layers import Block
from vtp.pretrain.objectives import Pretraining

BACKWARD = 2  # gradients of inputs and of weights cost a forward pass each


def step_flops(objectives: Pretraining, batch: Batch) -> int:
    """FLOPs of one rank's step, multiply and add counted apart: linears and attention, forward and backward.

    The model's, not the machine's: activations computed again and stochastic depth change nothing. Left out is what is
    no matrix product, and a perceptual network other than the teacher.
    """
    student, cfg = objectives.student, objectives.cfg
    train = 1 + BACKWARD
    flops = 0

    def trunk(pixels: tuple[int, ...], cost: int, read: int | None = None) -> int:
        images, side = pixels[0], cfg.model.vision.patch_size
        patches = (pixels[2] // side) * (pixels[3] // side)
        embed = 2 * images * patches * student.trunk.patch_embed.proj.weight.numel()
        flops = embed + transformer(student.trunk.blocks, images, 1 + patches, cfg.model.vision.embed_dim)
        if read is not None:  # the last feed-forward sees those tokens only
            feed = sum(p.numel() for p in cast(Block, student.trunk.blocks[-1]).mlp.parameters() if p.ndim > 1)
            flops -= 2 * (images * (1 + patches) - read) * feed
        return cost * flops

    if batch.clip is not None:
        width, blocks = cfg.model.text.embed_dim, student.text_transformer.resblocks
        projections = 2 * len(batch.clip.images) * (student.visual_proj.weight.numel() + width**2)
        text = sum(transformer(blocks, len(part), part.shape[1], width) for part in batch.clip.texts())
        flops += trunk(batch.clip.images.shape, train) + train * (text + projections)
    if batch.rec is not None:
        if not batch.rec.shared:
            flops += trunk(batch.rec.images.shape, train)
        images, patches = len(batch.rec.images), (cfg.model.image_size // cfg.model.vision.patch_size) ** 2
        decoder = student.pixel_decoder
        ends = decoder.proj_in.weight.numel() + decoder.proj_out.weight.numel()
        if student.trunk.feature_bottleneck is not None:
            ends += student.trunk.feature_bottleneck.weight.numel()
        width = cfg.model.decoder.embed_dim
        flops += train * (2 * images * patches * ends + transformer(decoder.blocks, images, patches, width))
        if objectives.teacher_perceives:  # of the image; of its reconstruction, and back to that
            flops += trunk(batch.rec.images.shape, 1 + 1 + BACKWARD // 2)
    if batch.ssl is not None:
        crops, local = batch.ssl.global_crops.flatten(0, 1), batch.ssl.local_crops.flatten(0, 1)
        head = 2 * sum(p.numel() for p in objectives.head.parameters() if p.shape[-1] > 1 and p.ndim > 1)
        seen = len(crops) + len(batch.ssl.mask_indices)
        flops += trunk(crops.shape, 1 + train, seen) + head * (seen + train * (seen + len(local)))
        if len(local):
            flops += trunk(local.shape, train, len(local))
    return flops


def transformer(blocks: nn.Module, sequences: int, length: int, width: int) -> int:
    """Forward FLOPs of transformer blocks; attention counts all pairs, also where a mask hides half of them."""
    depth = len(list(blocks.children()))
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim > 1)
    return 2 * sequences * length * (weights + 2 * depth * length * width)
