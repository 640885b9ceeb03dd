from dataclasses import replace

import pytest
import timm
import torch
from torch.nn import functional as F

from model.backbone import BackboneSpec, FrozenViT

SPEC = BackboneSpec(dim=24, depth=3, heads=3, patch=4, native_res=16)


def image(height, width, seed=0):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("registers", "rule"),
    [(0, {"scale_factor": (6.1 / 4, 3.1 / 4)}), (4, {"size": (6, 3), "antialias": True})],  # DINO's, DINOv2's
)
def test_position_embedding__is_resampled_elsewhere_than_at_the_native_grid(registers, rule):
    backbone = FrozenViT(replace(SPEC, registers=registers))
    assert backbone.position_embedding((4, 4)) is backbone.pos_embed
    patches = backbone.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(patches, mode="bicubic", **rule).flatten(2).transpose(1, 2)
    resampled = backbone.position_embedding((6, 3))
    torch.testing.assert_close(resampled[:, 1:], expected)
    assert torch.equal(resampled[:, :1], backbone.pos_embed[:, :1])
    tokens = backbone.tokens(image(24, 12))
    assert tokens.shape == (2, 1 + registers + 18, 24)
    assert backbone.last_features(tokens, (6, 3)).shape == (2, 24, 6, 3)


@pytest.mark.parametrize("registers", [0, 4])
def test_tokens__equal_timm_at_the_native_grid(registers):
    """An independent assembly of the same tokens: timm's own forward, where no resampling is involved."""
    torch.manual_seed(0)
    reference = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=0, global_pool="",
        init_values=0.1, reg_tokens=registers, no_embed_class=registers > 0, norm_layer=torch.nn.LayerNorm,
    ).eval()  # fmt: skip
    spec = BackboneSpec(24, 3, 3, 4, 16, registers=registers, layer_scale=True)
    backbone = FrozenViT(spec)
    state = reference.state_dict()
    if registers:
        state["register_tokens"] = state.pop("reg_token").normal_()
        reference.reg_token.data.copy_(state["register_tokens"])
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), state["pos_embed"]], dim=1)
    backbone.load_state_dict(state)
    backbone.norm.eps = reference.norm.eps
    for ours, theirs in zip(backbone.blocks, reference.blocks, strict=True):
        ours.norm1.eps, ours.norm2.eps = theirs.norm1.eps, theirs.norm2.eps
    with torch.no_grad():
        expected = reference.forward_features(image(16, 16))[:, 1 + registers :]
    features = backbone.last_features(backbone.tokens(image(16, 16)), (4, 4))
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_frozen__never_trains():
    backbone = FrozenViT(SPEC).train()
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.tokens(image(16, 16)).requires_grad


def check_attention_logits(backbone, tokens, grid):
    """The log of a softmax is its logits less a constant per row, and so is the mean over heads."""
    attention, seen = backbone.blocks[-1].attn, []
    logits = backbone.attention_logits(tokens, grid)
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    backbone.last_features(tokens, grid)
    expected = seen[0].log().mean(dim=1)
    centred = [each - each.mean(dim=-1, keepdim=True) for each in (logits, expected)]
    assert centred[1].std() > 0.1
    torch.testing.assert_close(*centred, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("registers", [0, 4])
def test_attention_logits__are_those_of_the_last_block(registers):
    torch.manual_seed(0)
    backbone = FrozenViT(BackboneSpec(24, 2, 3, 4, 16, registers=registers, layer_scale=True))
    backbone.blocks[-1].attn.qkv.weight.mul_(20)  # unlike attention, not uniform
    check_attention_logits(backbone, backbone.tokens(image(16, 16)), (4, 4))
