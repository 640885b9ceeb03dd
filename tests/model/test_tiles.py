"""Tiles cover an image, overlap, and blend without a seam."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from model.tiles import blended_code, tile_mistake, tile_starts


@pytest.mark.parametrize(("length", "side"), [(5, 4), (8, 4), (33, 8), (16, 16), (3, 8), (100, 28)])
def test_starts__cover_and_overlap_by_a_quarter(length, side):
    starts = tile_starts(length, side)
    assert starts[0] == 0
    if side < length:
        assert starts[-1] == length - side
        gaps = {b - a for a, b in itertools.pairwise(starts)}
        assert all(0 < gap <= side - side // 4 for gap in gaps)
        assert max(gaps) - min(gaps) <= 1


def average(image):
    """A code that a patch alone decides: tiles cannot change it."""
    return F.avg_pool2d(image, 2)


def test_blend__of_a_local_code_is_the_whole_code():
    image = torch.rand(1, 3, 26, 38, generator=torch.Generator().manual_seed(0))
    whole = blended_code(average, image, patch=2)
    assert torch.equal(whole, average(image))
    for tile in (8, 12, 26, 30):
        assert torch.allclose(blended_code(average, image, patch=2, tile=tile), whole, atol=1e-6)


def test_blend__image_not_larger_than_a_tile_is_taken_whole():
    shapes = []

    def encode(image):
        shapes.append(tuple(image.shape[-2:]))
        return average(image)

    blended_code(encode, torch.rand(1, 3, 16, 12), patch=2, tile=16)
    assert shapes == [(16, 12)]
    blended_code(encode, torch.rand(1, 3, 18, 12), patch=2, tile=16)
    assert shapes[1:] == [(16, 12)] * 2


def test_blend__has_no_seam():
    """Codes that jump from tile to tile: neighbouring patches of the blend differ by little."""
    values = iter(range(100))

    def encode(image):
        return torch.full((1, 1, *(side // 2 for side in image.shape[-2:])), float(next(values) % 2))

    code = blended_code(encode, torch.zeros(1, 3, 32, 112), patch=2, tile=32)[0, 0]  # (16, 56)
    assert code.min() == 0
    assert code.max() == 1
    assert (code[:, 1:] - code[:, :-1]).abs().max() < 0.5


@pytest.mark.parametrize("tile", [0, -8, 8, 31, 100])
def test_tile__must_be_a_multiple_of_the_patch(tile):
    assert "must be a multiple of the patch (8) from 32" in tile_mistake(tile, 8)
    assert tile_mistake(32, 8) is None
