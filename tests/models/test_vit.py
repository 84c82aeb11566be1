import jaxtyping
import pytest
import torch

from tests.tiny import tiny_model
from vtp.models.config import ModelConfig, TextConfig, ViTConfig
from vtp.models.vit import PatchEmbed, ViT
from vtp.models.vtp_hf import VTPConfig, VTPModel

SMALL = ViTConfig(patch_size=4, embed_dim=32, depth=3, num_heads=2, feature_bottleneck=8)


def test_tokens():
    trunk = ViT(SMALL).eval()
    images = torch.randn(2, 3, 8, 12)
    cls, patches, grid = trunk(images)
    assert cls.shape == (2, 32) and patches.shape == (2, 6, 32) and grid == (2, 3)
    assert trunk.bottleneck(cls).shape == (2, 8)
    whole = trunk(torch.nn.functional.pad(images, (0, 3, 0, 1)))  # what is not a whole patch is ignored, as published
    assert whole.grid == grid and torch.allclose(whole.patches, patches, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(3, 8\) pixels hold no whole patch of 4 x 4"):
        trunk(torch.randn(1, 3, 3, 8))


def test_patches_are_embedded_by_the_published_convolution():
    """As a product where gradients are asked for: its values and gradients, pixels beyond the last whole patch too."""
    embed, images = PatchEmbed(4, 8).double(), torch.randn(2, 3, 11, 13, dtype=torch.float64, requires_grad=True)
    product, convolved = embed(images), embed.proj(images).permute(0, 2, 3, 1)
    assert product.shape == (2, 2, 3, 8)
    with torch.no_grad():
        assert torch.equal(embed(images), convolved)
    torch.testing.assert_close(product, convolved)
    wanted = torch.randn_like(product)
    inputs = [images, *embed.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(product, inputs, wanted), torch.autograd.grad(convolved, inputs, wanted)
    )


def test_masked_patches_are_not_seen():
    trunk = ViT(SMALL).eval()
    images, masks = torch.randn(2, 3, 8, 8), torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    other = images.clone()
    other[0, :, :4, :4] = 9.0
    other[0, :, 4:, 4:] = -9.0
    torch.testing.assert_close(trunk(images, masks), trunk(other, masks))
    assert torch.equal(trunk(images, masks).cls[1], trunk(images).cls[1])


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_reading_some_tokens_is_the_whole_pass_at_those(drop_path):
    """Values, and gradients of all weights."""
    trunk, images, masks = ViT(SMALL).train(), torch.randn(4, 3, 8, 8), torch.rand(4, 4) < 0.5
    places = torch.tensor([0, 3, 4, 9, 15])
    gradients, values = [], []
    for read in (False, True):
        torch.manual_seed(0)  # of the stochastic depth
        if read:
            values.append(trunk.read([images], places, masks, drop_path))
        else:
            cls, patches, _ = trunk(images, masks, drop_path)
            values.append(torch.cat([cls, patches.flatten(0, 1)[places]]))
        trunk.zero_grad()
        values[-1].pow(3).sum().backward()
        gradients.append([p.grad for p in trunk.parameters()])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert torch.equal(trunk.eval().read([images]), trunk.read([images], places[:0]))  # class tokens alone


def test_views_of_several_sizes_do_not_see_each_other():
    """Values, and gradients of all weights, are those of calls apart."""
    trunk, masks, places = ViT(SMALL).train(), torch.rand(2, 4) < 0.5, torch.tensor([1, 6])
    views = [torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4), torch.randn(1, 3, 12, 8)]
    together = trunk.read(views, places, masks)
    apart = torch.cat([trunk.read(views[:1], places, masks), *(trunk.read([x]) for x in views[1:])])
    torch.testing.assert_close(together, apart)
    gradients = [torch.autograd.grad(x.pow(3).sum(), list(trunk.blocks.parameters())) for x in (together, apart)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_intermediate_features_are_those_on_the_way():
    trunk = ViT(SMALL).eval()
    images = torch.randn(1, 3, 8, 8)
    first, last = trunk.get_intermediate_layers(images, [2, 0], return_class_token=True)
    cls, patches, grid = trunk(images)
    torch.testing.assert_close(last, (patches, cls))
    assert not torch.allclose(first[0], patches)
    (maps,) = trunk.get_intermediate_layers(images, reshape=True)
    torch.testing.assert_close(maps, patches.mT.unflatten(2, grid))
    for blocks in ([3], [-1], []):
        with pytest.raises(ValueError, match="not among 0 ... 2"):
            trunk.get_intermediate_layers(images, blocks)


def test_forward_intermediates_are_timms():
    """Names, defaults, order and shapes of timm's method; values of the published one."""
    config = ModelConfig(image_size=8, train_clip=False, train_reconstruction=False, vision=SMALL)
    model = VTPModel(VTPConfig.from_model_config(config)).eval()
    trunk, images = model.trunk, torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        features, maps = trunk.forward_intermediates(images)
        assert [x.shape for x in maps] == [(2, 32, 2, 3)] * 3 and features.shape == (2, 7, 32)
        last = model.get_last_layer_feature(images)
        assert torch.equal(features[:, 0], last["cls_token"]) and torch.equal(features[:, 1:], last["patch_tokens"])
        for x, y in zip(maps, model.get_intermediate_layers_feature(images, 3, reshape=True, norm=False), strict=True):
            assert torch.equal(x, y) and x.is_contiguous()

        pairs = trunk.forward_intermediates(
            images, 2, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        expected = model.get_intermediate_layers_feature(images, n=2, return_class_token=True)
        for (patches, prefix), (ours, cls) in zip(pairs, expected, strict=True):
            assert torch.equal(patches, ours) and torch.equal(prefix, cls[:, None])

        early, (second, first) = trunk.forward_intermediates(images, [-2, 0], stop_early=True, output_fmt="NLC")
        assert torch.equal(second, maps[0].flatten(2).mT)  # in the order of the blocks, whatever that of the indices
        assert torch.equal(first, maps[1].flatten(2).mT) and torch.equal(early[:, 1:], trunk.norm(first))


def test_forward_intermediates_takes_timms_names():
    trunk = ViT(SMALL).eval()
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        (maps,) = trunk.forward_intermediates(x=images, indices=1, intermediates_only=True)
        assert torch.equal(maps, trunk.forward_intermediates(images, 1, intermediates_only=True)[0])


def test_inputs_of_another_shape_are_told_what_is_wanted():
    model = VTPModel(VTPConfig.from_model_config(tiny_model(patch=4)))
    told = []
    jaxtyping.config.update("jaxtyping_disable", True)  # here annotations are checked, and would object first
    try:
        for function, wrong in (
            *((model.trunk, torch.zeros(shape)) for shape in ([1, 1, 8, 8], [3, 8, 8], [1, 3, 3, 8])),
            (model.trunk, torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
            (model.get_latents_decoded_images, torch.zeros(2, 5, 4, 4)),
            (model.get_latents_decoded_images, torch.zeros(2, 8, 0, 4)),
            (model.get_clip_text_feature, torch.zeros(4, dtype=torch.int64)),
        ):
            with pytest.raises(ValueError) as error:
                function(wrong)
            told.append(str(error.value))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    grey, flat, small, whole, latents, empty, text = told
    assert grey.startswith("images of shape [1, 1, 8, 8], torch.float32: give [b, 3, H, W]")
    assert flat.startswith("images of shape [3, 8, 8]")
    assert small == "images of (3, 8) pixels hold no whole patch of 4 x 4"
    assert "torch.uint8: give" in whole and whole.endswith("ImageNet-normalised floats")
    assert latents == "latents of shape [2, 5, 4, 4]: give [b, 8, h, w]"
    assert empty == "latents of shape [2, 8, 0, 4]: give [b, 8, h, w]"
    assert text.startswith("text of shape [4], torch.int64: give token ids [texts, tokens], 1 to 24 tokens each")


@pytest.mark.parametrize("indices", [0, 4, [3], [0, -4], []])
def test_forward_intermediates_of_blocks_that_are_not_there(indices):
    with pytest.raises(ValueError, match=r"the 3 blocks are 0 \.\.\. 2, or -3 \.\.\. -1"):
        ViT(SMALL).forward_intermediates(torch.randn(1, 3, 8, 8), indices)
    with pytest.raises(ValueError, match="output_fmt='NHWC' is unknown"):
        ViT(SMALL).forward_intermediates(torch.randn(1, 3, 8, 8), output_fmt="NHWC")


def test_stop_early_computes_no_block_after_the_last_asked_for():
    trunk, ran = ViT(SMALL), []
    for i, block in enumerate(trunk.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    trunk.forward_intermediates(torch.randn(1, 3, 8, 8), [1], stop_early=True)
    assert ran == [0, 1]


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_reach_everything_under_autocast(drop_path, masked):
    trunk = ViT(ViTConfig(patch_size=4, embed_dim=32, depth=2, num_heads=2, use_qk_norm=True, init_values=0.1))
    masks = torch.tensor([[1, 0, 0, 1]] * 4, dtype=torch.bool) if masked else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = trunk(torch.randn(4, 3, 8, 8), masks, drop_path)
        assert tokens.cls.dtype == torch.float32
        loss = trunk.bottleneck(tokens.patches).float().square().sum() + tokens.cls.sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trunk.parameters())
    assert all(p.grad.any() for name, p in trunk.named_parameters() if masked or name != "mask_token")


def test_stochastic_depth_only_in_training():
    trunk = ViT(SMALL).eval()
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(trunk(images, drop_path=0.5).cls, trunk(images).cls)
    trunk.train()
    torch.testing.assert_close(trunk(images).cls, trunk.eval()(images).cls, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(trunk.train()(images, drop_path=0.5).cls, trunk(images).cls, atol=1e-2)


def test_initial_weights():
    torch.manual_seed(0)
    trunk = ViT(ViTConfig(patch_size=8, embed_dim=128, depth=2, num_heads=4))
    weights = dict(trunk.named_parameters())
    assert abs(weights["blocks.0.attn.qkv.weight"].std() - 0.02) < 1e-3
    assert abs(weights["blocks.1.mlp.w3.weight"].std() - 0.02) < 1e-3
    assert not weights["blocks.0.attn.qkv.bias"].any() and not weights["mask_token"].any()
    assert abs(weights["cls_token"].std() - 0.02) < 5e-3
    assert abs(weights["patch_embed.proj.weight"]).max() <= (1 / (3 * 8 * 8)) ** 0.5 + 1e-6
    assert (weights["norm.weight"] == 1).all()


def test_bad_configurations():
    with pytest.raises(ValueError, match=r"vision_embed_dim=100 .* 4 \* vision_num_heads=12; the next one is 144"):
        ViTConfig(embed_dim=100)
    with pytest.raises(ValueError, match="vision_ffn_layer='swiglu16' is unknown; one of 'mlp', 'swiglu'"):
        ViTConfig(ffn_layer="swiglu16")
    with pytest.raises(ValueError, match="vision_clip_feat"):
        ViTConfig(clip_feat="mean")
    with pytest.raises(ValueError, match="text_embed_cls"):
        TextConfig(embed_cls=True)
    with pytest.raises(ValueError, match="rope_dtype"):
        ModelConfig(rope_dtype="fp16")
