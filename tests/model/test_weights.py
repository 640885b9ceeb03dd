import pytest
import torch

from model.backbone import FrozenViT
from model.weights import backbone_spec, clean_state, load_backbone
from utils.errors import UserError


@pytest.fixture
def spec(tiny_options):
    return backbone_spec(tiny_options())


def random_state(spec, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=drawn)
        for name, value in FrozenViT(spec).state_dict().items()
    }


def same(module, state):
    return all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_load__bare_or_under_teacher_with_prefixes_and_heads(spec, tmp_path, prefix, wrapped):
    state = random_state(spec)
    stored = {prefix + name: value for name, value in state.items()} | {prefix + "head.weight": torch.ones(2)}
    torch.save({"teacher": stored} if wrapped else stored, tmp_path / "w.pth")
    backbone = FrozenViT(spec)
    load_backbone(backbone, str(tmp_path / "w.pth"))
    assert same(backbone, state)


def test_load__safetensors(spec, tmp_path):
    from safetensors.torch import save_file

    state = random_state(spec)
    save_file(state, tmp_path / "w.safetensors")
    backbone = FrozenViT(spec)
    load_backbone(backbone, str(tmp_path / "w.safetensors"))
    assert same(backbone, state)


def test_clean_state__chunks_mask_token_and_depth():
    one = torch.ones(1)
    state = {
        "mask_token": one, "dino_head.mlp": one, "blocks.0.0.norm1.weight": one,
        "blocks.1.7.norm1.weight": one, "blocks.1.8.norm1.weight": one, "norm.weight": one,
    }  # fmt: skip
    assert set(clean_state(state, 8)) == {"blocks.0.norm1.weight", "blocks.7.norm1.weight", "norm.weight"}


def test_load__file_that_does_not_fit_names_keys_and_shapes(spec, tmp_path):
    state = random_state(spec)
    state["pos_embed"] = state["pos_embed"][:, :5]
    del state["norm.weight"]
    torch.save(state | {"surplus": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        load_backbone(FrozenViT(spec), str(tmp_path / "w.pth"))
    for part in (
        "w.pth",
        "pos_embed: (1, 5, 24) in the file, (1, 17, 24)",
        "norm.weight: missing",
        "surplus: not",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello world", b"a sentence", b"\x80\x02K", b"PK\x03\x04damaged"])
def test_load__damaged_file_is_named(spec, tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth: not a readable weights file"):
        load_backbone(FrozenViT(spec), str(tmp_path / "w.pth"))


def test_load__damaged_safetensors(spec, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 30)
    with pytest.raises(UserError, match=r"w\.safetensors: not a readable weights file"):
        load_backbone(FrozenViT(spec), str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("content", [{1: torch.ones(1)}, [torch.ones(1)], {"a": 3}])
def test_load__no_state_dict(spec, tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="must hold a state dict"):
        load_backbone(FrozenViT(spec), str(tmp_path / "w.pth"))


def test_load__code_in_a_file_is_not_run(spec, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"teacher": Evil()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="not a readable weights file"):
        load_backbone(FrozenViT(spec), str(tmp_path / "w.pth"))
    assert not (tmp_path / "executed").exists()


def test_real_weights__load_and_their_features_tell_classes_apart(shared, tiny_options):
    """Ten blocks of a DINOv2-derived ViT-S/14: cosines within a class exceed those between classes."""
    import numpy as np
    from PIL import Image

    options = tiny_options(
        model__arch="dinov2", model__dim=384, model__pretrained__dino_patch_size=14,
        model__pretrained__depth=10, dataset__res=224, dataset__val_res=224,
    )  # fmt: skip
    backbone = FrozenViT(backbone_spec(options))
    load_backbone(backbone, str(shared / "data/weights/vits14_depth10.pth"))
    images, labels = [], []
    for path in sorted((shared / "data/camvid/imgs/val").iterdir())[::40]:
        images.append(np.asarray(Image.open(path).convert("RGB").resize((224, 224))))
        label = Image.open(shared / f"data/camvid/labels/val/{path.stem}.png")
        labels.append(np.asarray(label.resize((16, 16), Image.Resampling.NEAREST)))
    from utils.vision.transforms import normalise

    batch = normalise(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    features = backbone.last_features(backbone.tokens(batch), (16, 16)).permute(0, 2, 3, 1).flatten(0, 2)
    features = torch.nn.functional.normalize(features, dim=1)
    classes = torch.from_numpy(np.stack(labels)).flatten().long()
    cosine, same_class = features @ features.T, classes[:, None] == classes
    assert cosine[same_class].median() > 0.55
    assert cosine[~same_class].median() < 0.25
