import colorsys

import numpy as np
import pytest
import torch

from utils.vision.colour_view import ColourView, draw_colour_views

UNCHANGED = ColourView((0, 1, 2, 3), (1.0, 1.0, 1.0, 0.0), grey=False, sigma=None)
LUMA = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]


@pytest.fixture
def image():
    return torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(0))


def changed(index, factor):
    """A view that makes one adjustment."""
    factors = list(UNCHANGED.factors)
    factors[index] = factor
    return UNCHANGED._replace(factors=tuple(factors))


def literal_hue(image, shift):
    moved = np.empty((3, *image.shape[1:]), dtype=np.float32)
    for y, x in np.ndindex(*image.shape[1:]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
        moved[:, y, x] = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
    return torch.from_numpy(moved)


def test_view__adjustments_by_their_formulas(image):
    grey = (LUMA * image).sum(dim=0, keepdim=True)
    for view, expected in (
        (UNCHANGED, image),
        (changed(0, 1.25), 1.25 * image),
        (changed(1, 0.75), 0.75 * image + 0.25 * grey.mean()),
        (changed(2, 1.2), 1.2 * image - 0.2 * grey),
        (changed(3, 0.07), literal_hue(image, 0.07)),
        (UNCHANGED._replace(grey=True), grey.expand(3, -1, -1)),
    ):
        torch.testing.assert_close(view(image), expected.clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_view__blur_is_a_gaussian_of_five_pixels():
    image = torch.zeros(3, 9, 9)
    image[:, 4, 4] = 1
    weights = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * 1.3**2))
    expected = torch.zeros(9, 9)
    expected[2:7, 2:7] = torch.outer(weights, weights) / weights.sum() ** 2
    torch.testing.assert_close(UNCHANGED._replace(sigma=1.3)(image), expected.expand(3, -1, -1))


def test_view__applies_adjustments_in_the_drawn_order(image):
    view = UNCHANGED._replace(factors=(1.3, 0.7, 1.0, 0.0))
    brighter_last = changed(0, 1.3)(changed(1, 0.7)(image))
    torch.testing.assert_close(view._replace(order=(1, 0, 2, 3))(image), brighter_last)
    assert not torch.allclose(view(image), brighter_last)


def test_draw__ranges_and_frequencies():
    views = draw_colour_views(4000, torch.Generator().manual_seed(1))
    factors = torch.tensor([view.factors for view in views])  # (4000, 4)
    lowest, highest = torch.tensor([0.7, 0.7, 0.7, -0.1]), torch.tensor([1.3, 1.3, 1.3, 0.1])
    torch.testing.assert_close(factors.amin(dim=0), lowest, atol=0.005, rtol=0)
    torch.testing.assert_close(factors.amax(dim=0), highest, atol=0.005, rtol=0)
    sigmas = [view.sigma for view in views if view.sigma is not None]
    assert np.mean([view.grey for view in views]) == pytest.approx(0.2, abs=0.02)
    assert len(sigmas) / len(views) == pytest.approx(0.5, abs=0.03)
    assert (min(sigmas), max(sigmas)) == pytest.approx((0.1, 2.0), abs=0.01)
    assert len({view.order for view in views}) == 24


def test_draw__is_a_function_of_the_generator():
    first, again = (draw_colour_views(5, torch.Generator().manual_seed(2)) for _ in range(2))
    assert first == again
    assert first != draw_colour_views(5, torch.Generator().manual_seed(3))
