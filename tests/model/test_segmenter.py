import pytest
import torch

from model.backbone import BackboneSpec, FrozenViT
from model.segmenter import BlockSegmenter, dropout_mask
from utils.vision.transforms import normalise

TINY8 = BackboneSpec(dim=48, depth=4, heads=3, patch=8, native_res=224)
PUBLISHED = {"model": "backbone", "decoder": "head", "project_head": "projection"}


def run(segmenter, image):
    """Code, projections and criterion features of a batch of normalised images."""
    tokens, grid = segmenter.backbone.tokens(image), segmenter.grid(image)
    code = segmenter.code(tokens, grid)
    return {"code": code, "z": segmenter.project(code), "crit": segmenter.features(tokens, grid)}


@pytest.fixture
def stored(golden):
    return golden("model_tiny8")


@pytest.fixture
def segmenter(stored):
    state = {}
    for key, value in vars(stored).items():
        if key.startswith("sd/"):
            part, name = key.removeprefix("sd/").split(".", 1)
            state[f"{PUBLISHED[part]}.{name}"] = value
    network = BlockSegmenter(FrozenViT(TINY8))
    network.load_state_dict(state)
    return network


@pytest.mark.parametrize("place", ["0", "1"])
def test_segmenter__golden(segmenter, stored, place):
    for name, found in run(segmenter, getattr(stored, f"img{place}")).items():
        torch.testing.assert_close(found.detach(), getattr(stored, name + place), atol=1e-4, rtol=0)


def test_segmenter__gradients_reach_head_and_projection_alone(segmenter, stored):
    segmenter.train()
    output = run(segmenter, stored.img0)
    output["z"].sum().backward()
    assert not output["crit"].requires_grad
    assert all(parameter.grad is not None for parameter in segmenter.trainable())
    assert all(parameter.grad is None for parameter in segmenter.backbone.parameters())
    assert not segmenter.backbone.training


def test_flip__code_of_the_mirror_image_is_the_mirrored_code(segmenter):
    image = torch.randint(256, (2, 3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = segmenter.grid(image)
    code, mirrored = (segmenter.code_of(given, grid, flip=True) for given in (image, image.flip(-1)))
    torch.testing.assert_close(code, mirrored.flip(-1))
    assert not torch.allclose(code, segmenter.code_of(image, grid))


def test_frozen_weights__cast_once_give_what_autocast_gives(segmenter):
    image = torch.randint(256, (2, 3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid, backbone = segmenter.grid(image), segmenter.backbone
    with torch.autocast("cpu", torch.bfloat16):
        expected = backbone.tokens(normalise(image))
        assert torch.equal(segmenter.tokens(image), expected)
        assert torch.equal(segmenter.features(expected, grid), backbone.last_features(expected, grid))
        backbone.load_state_dict(FrozenViT(TINY8).state_dict())
        assert not torch.equal(segmenter.tokens(image), expected)
    assert all(weight.dtype == torch.float32 for weight in segmenter.state_dict().values())


def test_dropout_mask__factors_of_channels():
    mask = dropout_mask((40, 50), probability=0.3, generator=torch.Generator().manual_seed(0))
    assert mask.shape == (40, 50, 1, 1)
    assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(mask[mask > 0], torch.full_like(mask[mask > 0], 1 / 0.7))
