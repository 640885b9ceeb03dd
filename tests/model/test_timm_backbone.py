"""Models of timm as backbones, with random weights, compared with timm's own forward pass."""

import json
from functools import partial

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


@pytest.fixture(scope="module")
def reference():
    """timm's model of a name, which takes images of any size."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = randomised(timm.create_model(name, num_classes=0, dynamic_img_size=True))
        return made[name]

    return get


@pytest.fixture
def backbone(reference):
    def build(name, depth=None):
        found = TimmViT(name, depth)
        state, own = reference(name).state_dict(), found.vit.state_dict()
        found.vit.load_state_dict({key: state[key] for key in own})
        return found

    return build


def image(height, width):
    """Normalised with ImageNet's mean and standard deviation."""
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


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
def test_features__equal_timm_at_native_and_other_sizes(reference, backbone, name, sizes):
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
def test_features__equal_timm_after_an_inner_block(reference, backbone, name):
    theirs, values = reference(name), image(64, 48)
    (expected,) = theirs.forward_intermediates(
        as_timm(values, theirs), indices=[4], norm=True, intermediates_only=True
    )
    torch.testing.assert_close(features_of(backbone(name, 5), values), expected, atol=1e-5, rtol=1e-5)


def test_segmenter__head_is_rotated_and_starts_as_the_frozen_features(backbone):
    network = BlockSegmenter(backbone(DINOV3, 3))
    tokens = network.tokens(torch.randint(256, (2, 3, 48, 64), dtype=torch.uint8))
    output = network(tokens, (3, 4))
    assert torch.equal(output.code, output.crit)
    assert (network.code(tokens, (4, 3)) - output.code.reshape(2, -1, 4, 3)).abs().max() > 1e-3
    output.z.sum().backward()
    assert all(parameter.grad is not None for parameter in network.trainable())
    assert not any(parameter.requires_grad for parameter in network.train().backbone.parameters())
    assert not network.backbone.vit.training


@pytest.mark.parametrize("name", [DINOV3, EVA, PLAIN])
def test_attention_logits__are_those_of_the_last_block(backbone, name):
    """The log of a softmax is its logits less a constant per row, and so is the mean over heads."""
    ours, seen = backbone(name, 2), []
    values, grid = image(4 * ours.spec.patch, 2 * ours.spec.patch), (4, 2)
    tokens = ours.tokens(values)
    logits = ours.attention_logits(tokens, grid)
    attention = ours.blocks[-1].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    ours.last_features(tokens, grid)
    expected = seen[0].log().mean(dim=1)
    centred = [each - each.mean(dim=-1, keepdim=True) for each in (logits, expected)]
    assert centred[1].std() > 0.1
    torch.testing.assert_close(*centred, atol=1e-4, rtol=1e-4)


def test_attention_logits__of_parallel_attention_are_refused():
    ours = TimmViT("vit_small_patch16_18x2_224", 2)
    with pytest.raises(UserError, match="attention of its last block cannot be read"):
        ours.attention_logits(ours.tokens(image(32, 32)), (2, 2))


def test_cast__gives_what_autocast_gives(backbone):
    network = BlockSegmenter(backbone(DINOV3, 2))
    values = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        cast = network.features(network.tokens(values), (2, 3))
    plain = network.features(network.tokens(values), (2, 3))
    assert F.cosine_similarity(cast.float(), plain).min() > 0.99


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


@pytest.mark.parametrize("form", ["timm", "original", "training", "safetensors"])
def test_load__files_of_timm_and_of_the_original_code(reference, tmp_path, capsys, form):
    state = reference(DINOV3).state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "training":
        torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, path)
    else:
        torch.save(original_dinov3(state) if form == "original" else state, path)
    backbone = TimmViT(DINOV3, 3)
    assert load_backbone(backbone, str(path)) == str(path)
    assert all(torch.equal(value, state[name]) for name, value in backbone.vit.state_dict().items())
    assert capsys.readouterr().out == ""


def test_load__mae_keeps_the_encoder(reference, tmp_path):
    state = reference(PLAIN).state_dict()
    decoder = {"mask_token": torch.ones(1), "decoder_pos_embed": torch.ones(2)}
    torch.save({"model": state | decoder}, tmp_path / "mae.pth")
    backbone = TimmViT(PLAIN, 2)
    load_backbone(backbone, str(tmp_path / "mae.pth"))
    assert all(torch.equal(value, state[name]) for name, value in backbone.vit.state_dict().items())


def test_load__file_of_another_model(reference, tmp_path):
    torch.save(reference(PLAIN).state_dict(), tmp_path / "w.pth")
    for name in (DINOV3, EVA, "vit_small_patch14_reg4_dinov2"):
        with pytest.raises(UserError, match=r"w\.pth.* does not fit"):
            load_backbone(TimmViT(name, 2), str(tmp_path / "w.pth"))


def test_load__official_weights_that_do_not_exist():
    backbone = TimmViT("test_vit4", 2)
    with pytest.raises(UserError, match=r"is test_vit4: timm cannot load .*pretrained_weights to a local"):
        load_backbone(backbone, None)


def test_load__official_weights(reference, monkeypatch):
    theirs = reference(PLAIN)
    backbone = TimmViT(PLAIN, 2)
    monkeypatch.setattr(timm, "create_model", lambda name, *, pretrained, **_: pretrained and theirs)
    assert load_backbone(backbone, None) == f"timm's weights of {PLAIN}"
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in backbone.vit.state_dict().items())


@pytest.fixture
def options(tiny_options):
    return partial(
        tiny_options, model__arch="timm", model__name=DINOV3, model__dim=384, model__pretrained__depth=2
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model__name": "vit_small_patch16_dino3"}, ["vit_small_patch16_dino3", f"similar: {DINOV3}"]),
        ({"model__name": f"{DINOV3}.lvd"}, [f"{DINOV3}.lvd1689m"]),
        ({"model__name": "swin_tiny_patch4_window7_224"}, ["swin_tiny", "vision_transformer, deit, eva"]),
        ({"model__pretrained__depth": 13}, ["model.pretrained.depth is 13, must be at most 12"]),
        ({"dataset__res": 40, "dataset__val_res": 56}, ["dataset.res is 40", "dataset.val_res is 56", "16"]),
    ],
)
def test_build__mistakes(options, changes, parts):
    with pytest.raises(UserError) as error:
        build_backbone(options(**changes))
    assert all(part in str(error.value) for part in parts)


def test_build__width_is_that_of_the_model(options, monkeypatch):
    monkeypatch.setattr("model.load_backbone", lambda *_: "a test")
    with pytest.raises(UserError, match=r"model\.dim is 96, must be 384"):
        build_module(options(model__dim=96), LABELS)


@pytest.mark.parametrize(
    ("arch", "name", "valid"),
    [
        ("timm", DINOV3, True), ("timm", None, False), ("timm", "STEGO", False),
        ("dino", None, True), ("dino", "STEGO", True), ("dino", DINOV3, False),
    ],
)  # fmt: skip
def test_options__a_name_with_timm_alone(arch, name, valid):
    flat = {"model.arch": arch, "model.name": name}
    if valid:
        assert build_options(flat, source="a test").model.name == (name if arch == "timm" else None)
        return
    with pytest.raises(UserError, match=r"model\.name is .*, must be .* with model\.arch"):
        build_options(flat, source="a test")


@pytest.mark.usefixtures("no_figures")
def test_run__trains_from_cached_tokens_and_predicts(reference, tmp_path):
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
    frozen = segment.module.segmenter.backbone.vit.state_dict()
    assert torch.equal(frozen["blocks.1.mlp.fc1.weight"], reference(DINOV3).blocks[1].mlp.fc1.weight)
    assert not torch.equal(
        frozen["blocks.1.mlp.fc1.weight"], segment.module.segmenter.head.state_dict()["mlp.fc1.weight"]
    )
