import numpy as np
import pytest

from vtp.data.masks import block_masks, quotas, targets


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (2, 2), (3, 7)])
def test_the_total_is_exact_and_masked_crops_are_within_their_ratio(grid):
    n, patches = 24, grid[0] * grid[1]
    for seed in range(20):
        masks = block_masks(n, grid, 0.5, (0.1, 0.5), np.random.default_rng(seed))
        counts = masks.sum(1)
        assert counts.sum() == quotas(n, patches, 0.5, (0.1, 0.5)).sum()
        assert (counts > 0).sum() == 12
        assert counts.max() <= np.ceil(0.5 * patches)
        assert counts[counts > 0].min() >= np.floor(0.1 * patches)


def test_quotas_spread_evenly():
    counts = quotas(100, 1000, 1.0, (0.1, 0.5))
    assert counts.mean() == 300 and counts.min() == 102 and counts.max() == 498
    assert quotas(5, 16, 0.0, (0.1, 0.5)).sum() == 0


def test_every_place_is_masked_now_and_then_and_masks_are_blocks():
    rng = np.random.default_rng(0)
    masks = block_masks(4000, (8, 8), 1.0, (0.3, 0.3), rng).reshape(-1, 8, 8)
    often = masks.mean(0)
    assert often.min() > 0.05 and often.max() < 0.6  # blocks cover corners less often
    neighbours = (masks[:, :, 1:] == masks[:, :, :-1]).mean()
    assert neighbours > 0.75  # independent patches would agree in 0.58 of the cases


def test_targets_point_at_the_masked_patches_and_weigh_crops_equally():
    masks = block_masks(10, (6, 6), 0.5, (0.1, 0.5), np.random.default_rng(1))
    indices, weights = targets(masks)
    flat = np.zeros(masks.size, bool)
    flat[indices] = True
    np.testing.assert_array_equal(flat.reshape(masks.shape), masks)
    np.testing.assert_allclose(np.bincount(indices // 36, weights, 10), masks.any(1))
    assert indices.dtype == np.int64 and weights.dtype == np.float32
