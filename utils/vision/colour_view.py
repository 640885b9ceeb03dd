"""The second view of HP: random changes of colour and sharpness that leave every pixel where it is."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import functional as vision

STRENGTHS = (0.3, 0.3, 0.3, 0.1)  # of brightness, contrast, saturation and hue
GREY, BLUR = 0.2, 0.5  # probabilities
SIDE, SIGMAS = 5, (0.1, 2.0)  # pixels of the blur, and the range of its standard deviation
ADJUSTMENTS = (
    vision.adjust_brightness,
    vision.adjust_contrast,
    vision.adjust_saturation,
    vision.adjust_hue,
)


class ColourView(NamedTuple):
    """The drawn changes of one image; calling it applies them."""

    order: tuple[int, ...]  # of the four adjustments
    factors: tuple[float, ...]  # of brightness, contrast, saturation (1 changes nothing) and hue (0)
    grey: bool
    sigma: float | None  # of the blur; None: sharp

    def __call__(self, image: Tensor) -> Tensor:
        """The changed image, (3, H, W) float in [0, 1]; other values are clamped as torchvision does."""
        for index in self.order:
            image = ADJUSTMENTS[index](image, self.factors[index])
        if self.grey:
            image = vision.rgb_to_grayscale(image, num_output_channels=3)
        return image if self.sigma is None else vision.gaussian_blur(image, [SIDE, SIDE], [self.sigma] * 2)


def draw_colour_views(count: int, generator: torch.Generator) -> list[ColourView]:
    """Draws the changes of `count` images from a CPU generator."""
    orders = torch.rand(count, len(STRENGTHS), generator=generator).argsort(dim=1).tolist()
    signed = 2 * torch.rand(count, len(STRENGTHS), generator=generator) - 1
    factors = (torch.tensor([1.0, 1.0, 1.0, 0.0]) + signed * torch.tensor(STRENGTHS)).tolist()
    low, high = SIGMAS
    views = []
    for order, each, drawn in zip(
        orders, factors, torch.rand(count, 3, generator=generator).tolist(), strict=True
    ):
        sigma = low + (high - low) * drawn[2] if drawn[1] < BLUR else None
        views.append(ColourView(tuple(order), tuple(each), drawn[0] < GREY, sigma))
    return views
