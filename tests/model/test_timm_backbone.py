"""Models of timm as backbones, with random weights, compared with timm's own forward pass."""

import json
from functools import cache, partial

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import run
from model import build_module, load_segmenter
from model.segmenter import BlockSegmenter
from model.timm_backbone import TimmViT
from model.weights import build_backbone, load_backbone
from tests.conftest import write_tiny
from tests.model.test_backbone import check_attention_logits, image
from utils.config.loading import build_options
from utils.errors import UserError
from utils.vision.labels import LabelSpace
from utils.vision.transforms import MEAN, STD

DINOV3, EVA, MIXED = "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"
PLAIN, WITHOUT_CLS = "vit_tiny_patch16_224", "vit_medium_patch16_gap_240"
LABELS = LabelSpace.with_spread_colours(("one", "two"))


def randomised(module):
    """Random values also where timm starts with zeros and ones, such as biases and layer scales."""
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=drawn))
    return module.eval()


@cache
def reference(name):
    """timm's model of a name, which takes images of any size."""
    torch.manual_seed(0)
    return randomised(timm.create_model(name, num_classes=0, dynamic_img_size=True))


def backbone(name, depth=None):
    found, state = TimmViT(name, depth), reference(name).state_dict()
    found.vit.load_state_dict({key: state[key] for key in found.vit.state_dict()})
    return found


def as_timm(values, vit):
    """The same image with the normalisation of a model of timm."""
    mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = values * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (pixels - mean) / std


def features_of(backbone, values):
    grid = values.shape[-2] // backbone.spec.patch, values.shape[-1] // backbone.spec.patch
    return backbone.last_features(backbone.tokens(values), grid)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [(DINOV3, [(256, 256), (96, 160)]), (EVA, [(224, 224), (56, 112)]), (PLAIN, [(224, 224), (112, 32)])],
)
def test_features__equal_timm_at_native_and_other_sizes(name, sizes):
    theirs, ours = reference(name), backbone(name)
    for size in sizes:
        values = image(*size)
        with torch.no_grad():
            expected = theirs.forward_features(as_timm(values, theirs))[:, theirs.num_prefix_tokens :]
            expected = theirs.fc_norm(expected)  # the identity, except for EVA's
        found = features_of(ours, values).flatten(2).transpose(1, 2)
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [DINOV3, MIXED, WITHOUT_CLS])
def test_features__equal_timm_after_an_inner_block(name):
    theirs, values = reference(name), image(64, 48)
    (expected,) = theirs.forward_intermediates(
        as_timm(values, theirs), indices=[4], norm=True, intermediates_only=True
    )
    torch.testing.assert_close(features_of(backbone(name, 5), values), expected, atol=1e-5, rtol=1e-5)


def test_segmenter__head_is_rotated_and_starts_as_the_frozen_features():
    network = BlockSegmenter(backbone(DINOV3, 3))
    values = torch.randint(256, (2, 3, 48, 64), dtype=torch.uint8)
    tokens = network.tokens(values)
    code, features = network.code(tokens, (3, 4)), network.features(tokens, (3, 4))
    assert torch.equal(code, features)
    assert (network.code(tokens, (4, 3)) - code.reshape(2, -1, 4, 3)).abs().max() > 1e-3
    network.train().project(code).sum().backward()
    assert all(parameter.grad is not None for parameter in network.trainable())
    assert not any(parameter.requires_grad for parameter in network.backbone.parameters())
    assert not network.backbone.vit.training
    with torch.autocast("cpu", torch.bfloat16):  # with a cast copy of the weights
        cast = network.features(network.tokens(values), (3, 4))
    assert F.cosine_similarity(cast.float(), features).min() > 0.99


@pytest.mark.parametrize("name", [DINOV3, EVA, PLAIN])
def test_attention_logits__are_those_of_the_last_block(name):
    ours = backbone(name, 2)
    check_attention_logits(ours, ours.tokens(image(4 * ours.spec.patch, 2 * ours.spec.patch)), (4, 2))


def original_dinov3(state):
    """Names and shapes of the original DINOv3 files."""
    renamed = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    for name, value in state.items():
        name = name.replace("reg_token", "storage_tokens").replace("gamma_", "ls")
        renamed[name + ".gamma" if name[-3:] in ("ls1", "ls2") else name] = value
    for block in range(12):
        renamed[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(3 * 384)
        renamed[f"blocks.{block}.attn.qkv.bias_mask"] = torch.full((3 * 384,), torch.nan)
    return renamed


def of_training(state):
    return {"teacher": {f"backbone.{key}": value for key, value in state.items()}}


def of_mae(state):
    return {"model": state | {"mask_token": torch.ones(1), "decoder_pos_embed": torch.ones(2)}}


@pytest.mark.parametrize(
    ("name", "form", "file"),
    [
        (DINOV3, dict, "w.safetensors"),
        (DINOV3, original_dinov3, "w.pth"),
        (DINOV3, of_training, "w.pth"),
        (PLAIN, of_mae, "w.pth"),
    ],
)
def test_load__files_of_timm_and_of_the_original_code(tmp_path, capsys, name, form, file):
    state, path, found = reference(name).state_dict(), tmp_path / file, TimmViT(name, 3)
    (save_file if path.suffix == ".safetensors" else torch.save)(form(state), path)
    assert load_backbone(found, str(path)) == str(path)
    assert all(torch.equal(value, state[key]) for key, value in found.vit.state_dict().items())
    assert capsys.readouterr().out == ""


def test_load__file_of_another_model(tmp_path):
    torch.save(reference(PLAIN).state_dict(), tmp_path / "w.pth")
    for name in (DINOV3, EVA):
        with pytest.raises(UserError, match=r"w\.pth .*does not fit"):
            load_backbone(TimmViT(name, 2), str(tmp_path / "w.pth"))


def test_load__official_weights(monkeypatch):
    with pytest.raises(UserError, match=r"is test_vit4: timm cannot load .*pretrained_weights to a local"):
        load_backbone(TimmViT("test_vit4", 2), None)  # which has none
    theirs, found = reference(PLAIN), TimmViT(PLAIN, 2)
    monkeypatch.setattr(timm, "create_model", lambda name, *, pretrained, **_: pretrained and theirs)
    assert load_backbone(found, None) == f"timm's weights of {PLAIN}"
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.vit.state_dict().items())


@pytest.fixture
def options(tiny_options):
    return partial(
        tiny_options, model__arch="timm", model__name=DINOV3, model__dim=384, model__pretrained__depth=2
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__name": "vit_small_patch16_dino3"}, rf"dino3, must be .* Did you mean {DINOV3}\?"),
        ({"model__name": "swin_tiny_patch4_window7_224"}, r"\(vision_transformer, deit, eva\)"),
        ({"model__pretrained__depth": 13}, r"model\.pretrained\.depth is 13, must be at most 12"),
        ({"dataset__res": 40, "dataset__val_res": 56}, r"dataset\.res is 40, .* 16(.|\n)*val_res is 56"),
    ],
)
def test_build__mistakes(options, changes, message):
    with pytest.raises(UserError, match=message):
        build_backbone(options(**changes))


def test_build__width_is_that_of_the_model(options, monkeypatch):
    monkeypatch.setattr("model.load_backbone", lambda *_: "a test")
    with pytest.raises(UserError, match=r"model\.dim is 96, must be 384"):
        build_module(options(model__dim=96), LABELS)


@pytest.mark.parametrize(("arch", "name"), [("timm", None), ("timm", "STEGO"), ("dino", DINOV3)])
def test_options__a_name_with_timm_alone(arch, name):
    with pytest.raises(UserError, match=r"model\.name is .*, must be .* with model\.arch"):
        build_options({"model.arch": arch, "model.name": name}, source="a test")


@pytest.mark.usefixtures("no_figures")
def test_run__trains_from_cached_tokens_and_predicts(tmp_path):
    torch.save(reference(DINOV3).state_dict(), tmp_path / "w.pth")
    path = write_tiny(
        tmp_path, model__arch="timm", model__name=DINOV3, model__dim=384, model__pretrained__depth=2,
        model__pretrained__pretrained_weights=str(tmp_path / "w.pth"), dataset__cache_features="disk",
        training_coeff__initialcrit_pos=0.0, training_coeff__initialcrit_amb=-0.5, eval__is_crf=False,
    )  # fmt: skip
    run.main(["--opt", path])
    metrics = json.loads((tmp_path / "output/tiny/metrics.json").read_text())
    assert metrics["before_crf"]["Cluster_mIoU"] > 0
    segment = load_segmenter(tmp_path / "output/tiny/best.ckpt")
    assert segment(torch.randint(256, (48, 80, 3), dtype=torch.uint8).numpy()).shape == (48, 80)
    network, name = segment.module.segmenter, "mlp.fc1.weight"
    frozen = network.backbone.blocks[1].get_parameter(name)
    assert torch.equal(frozen, reference(DINOV3).blocks[1].get_parameter(name))
    assert not torch.equal(frozen, network.head.get_parameter(name))
