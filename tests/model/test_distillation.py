from dataclasses import replace

import pytest
import torch

from model.backbone import BackboneSpec, FrozenViT
from model.distillation import (
    Crop,
    Recipe,
    centre_features,
    distil,
    distillation_loss,
    draw_crops,
    places,
    recolour,
    spread_init,
)
from utils.training.randomness import generator, seeded
from utils.vision.transforms import normalise

SHORT = Recipe(steps=12, batch_size=8, global_side=16, local_side=8, local_crops=1, prototypes=8, warmup=2)


def scenes(count=16):
    """Stripes one way or the other, which a crop tells apart."""
    line = (torch.arange(32) // 2 % 2 * 255).to(torch.uint8)
    rows, columns = line[:, None].expand(32, 32), line[None].expand(32, 32)
    return torch.stack([(rows, columns)[index % 2].expand(3, 32, 32) for index in range(count)])


def vit():
    with seeded(0, "test"):
        return FrozenViT(BackboneSpec(dim=24, depth=2, heads=2, patch=4, native_res=32))


def crop(scale, centre):
    return Crop(torch.empty(1, 3, 8, 8), torch.tensor([scale]), torch.tensor([centre]))


def test_places__of_a_crop_in_itself_are_its_patch_centres():
    one = crop((0.5, 0.5), (0.1, -0.2))
    expected = torch.tensor([[[-0.5, -0.5], [0.5, -0.5]], [[-0.5, 0.5], [0.5, 0.5]]])
    torch.testing.assert_close(places(one, one, side=2)[0], expected)


def test_places__follow_mirroring_and_displacement():
    one, other = crop((0.5, 0.5), (0.0, 0.0)), crop((-0.5, 0.5), (0.25, 0.0))
    found = places(one, other, side=2)[0]  # x is mirrored, and a quarter scene is half a crop
    expected = torch.tensor([[[1.0, -0.5], [0.0, -0.5]], [[1.0, 0.5], [0.0, 0.5]]])
    torch.testing.assert_close(found, expected)


def test_crops__show_what_lies_where_they_say():
    """A scene that is its own map of places: each pixel's colour says where it lies."""
    line = (torch.arange(64) * 2 + 1) / 64 - 1
    x, y = torch.meshgrid(line, line, indexing="xy")
    whole = torch.stack([x, y, torch.zeros_like(x)])[None]  # (1, 3, 64, 64), in [-1, 1]
    drawn = generator(0, "test")
    taken = {}

    def keep(images, recipe, drawn):
        taken["images"] = images
        return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.distillation.recolour", keep)
        (found, *_) = draw_crops(((whole + 1) * 127.5).to(torch.uint8), SHORT, drawn)
    line = (torch.arange(16) * 2 + 1) / 16 - 1
    own = torch.stack(torch.meshgrid(line, line, indexing="xy"))  # (2, 16, 16)
    expected = own * found.scale[0, :, None, None] + found.centre[0, :, None, None]
    torch.testing.assert_close(2 * found.images[0, :2] - 1, expected, atol=0.02, rtol=0)


def test_loss__is_least_where_both_say_the_same():
    same = crop((0.5, 0.5), (0.0, 0.0))
    sure = torch.eye(4)[torch.tensor([[0, 1], [2, 3]])].permute(2, 0, 1)[None]  # (1, K, 2, 2)
    agree, differ = (
        distillation_loss([sure, score], [sure], centre=torch.zeros(4), crops=[same, same], recipe=SHORT)
        for score in (sure, sure.flip(1))
    )
    assert agree < 0.01 < differ


def test_loss__leaves_out_patches_that_the_other_crop_does_not_show():
    here, half = crop((0.5, 0.5), (0.0, 0.0)), crop((0.5, 0.5), (0.5, 0.0))  # its right half alone
    target = torch.eye(2)[torch.tensor([[0, 0], [0, 0]])].permute(2, 0, 1)[None]
    right = torch.eye(2)[torch.tensor([[1, 0], [1, 0]])].permute(2, 0, 1)[None]  # wrong on the left
    loss = distillation_loss(
        [target, right], [target], centre=torch.zeros(2), crops=[half, here], recipe=SHORT
    )
    assert loss < 0.01


def test_recolour__leaves_the_range_of_images_and_differs_between_crops():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = recolour(images, SHORT, generator(0, "test"))
    low, high = (normalise(torch.full((1, 3, 1, 1), value)) for value in (0, 255))
    assert (found >= low - 1e-6).all()
    assert (found <= high + 1e-6).all()
    assert not torch.equal(found, recolour(images, SHORT, generator(1, "test")))


def test_distil__is_a_function_of_the_seed_and_leaves_its_start_alone():
    start = vit()
    before = start.blocks[0].mlp.fc1.weight.clone()
    first, again, other = (distil(start, scenes(), recipe=SHORT, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.blocks[0].mlp.fc1.weight, again.blocks[0].mlp.fc1.weight)
    assert not torch.equal(first.blocks[0].mlp.fc1.weight, other.blocks[0].mlp.fc1.weight)
    assert torch.equal(start.blocks[0].mlp.fc1.weight, before)
    assert not torch.equal(first.blocks[0].mlp.fc1.weight, before)
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_distil__tells_two_textures_apart():
    start = vit()
    with seeded(0, "start"):
        spread_init(start)
    made = distil(start, scenes(), recipe=replace(SHORT, steps=150, warmup=20), seed=0)
    centre_features(made, scenes(), share=1.0)

    def mean_cosines(network):
        maps = network.last_features(network.tokens(normalise(scenes(4))), (8, 8))  # (4, D, 8, 8)
        rows = torch.nn.functional.normalize(maps.mean(dim=(2, 3)), dim=1)
        return (rows @ rows.T)[0]  # to itself, to the other texture, to its own, to the other

    cosines = mean_cosines(made)
    assert cosines[2] > 0.9
    assert cosines[1] < 0


def mean_feature(network):
    return network.last_features(network.tokens(normalise(scenes())), (8, 8)).mean(dim=(0, 2, 3))


def test_centre_features__takes_its_share_of_the_mean_out():
    network = vit()
    before = mean_feature(network)
    centre_features(network, scenes(), share=0.25)
    torch.testing.assert_close(mean_feature(network), 0.75 * before, atol=1e-5, rtol=0)
    assert before.abs().max() > 1e-3


def test_spread_init__filters_have_no_mean():
    network = vit()
    spread_init(network)
    assert network.patch_embed.proj.weight.mean(dim=(2, 3)).abs().max() < 1e-7
