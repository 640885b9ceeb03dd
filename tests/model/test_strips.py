"""Strips of a large map give what the whole map gives."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.strips import strongest_channel
from utils.vision.upsampling import bilinear_taps

LOGITS = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0))


def test_strongest__is_that_of_the_upsampled_logits():
    for size in ((97, 131), (6, 9), (4, 5)):
        expected = F.interpolate(LOGITS[None], size=size, mode="bilinear")[0].argmax(dim=0)
        assert torch.equal(strongest_channel(LOGITS, size).long(), expected)


@pytest.mark.parametrize("held", [1, 5 * 131 * 10, 5 * 131 * 97])
def test_strongest__strips_with_a_leftover_are_the_whole(held):
    whole = strongest_channel(LOGITS, (97, 131), held=10**9)
    assert torch.equal(strongest_channel(LOGITS, (97, 131), held=held), whole)


def test_strongest__extent_crops_what_was_padded():
    """A grid of 6 x 9 patches of 4 pixels, of which 21 x 34 pixels are the image."""
    full = F.interpolate(LOGITS[None], size=(24, 36), mode="bilinear")[0, :, :21, :34].argmax(dim=0)
    assert torch.equal(strongest_channel(LOGITS, (21, 34), extent=(21 / 4, 34 / 4)).long(), full)


def test_strongest__holds_no_more_than_it_is_told(monkeypatch):
    """A map of 3 megapixels and 5 channels is never made: 60 MB, where 400 kB are held."""
    seen = []
    lerp = torch.lerp
    monkeypatch.setattr(torch, "lerp", lambda *given: seen.append(lerp(*given)) or seen[-1])
    strongest_channel(LOGITS, (1500, 2000), held=10**5)
    assert max(part.numel() for part in seen) <= 10**5


def test_taps__extent_of_all_is_none():
    for given, expected in zip(
        (bilinear_taps(7, 30, extent=7.0), bilinear_taps(7, 10, extent=7 / 3)),
        (bilinear_taps(7, 30), bilinear_taps(7, 30)),
        strict=True,
    ):
        n = len(given.low)
        assert np.array_equal(given.low, expected.low[:n])
        assert np.allclose(given.weight, expected.weight[:n], atol=1e-6)
