"""Joint image and label transforms, and the ImageNet normalisation.

Resizing and cropping are Pillow's: its NEAREST picks other pixels than a tensor's nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class Geometry:
    """Brings an image and its label to res x res pixels.

    Attributes:
        res: side of the result in pixels.
        crop: "center" or "random" resizes the shorter side to `res` and crops; None squashes to a square.
        interpolation: how the image is resized; the label is always nearest.
    """

    res: int
    crop: str | None = "center"
    interpolation: str = "nearest"

    def __call__(
        self, image: Image.Image, label: Image.Image | None, generator: torch.Generator | None = None
    ) -> tuple[Image.Image, Image.Image | None]:
        """The same resize and crop of both.

        Args:
            image: any size, mode RGB.
            label: the same size, mode L, or None.
            generator: where a random crop comes from.
        """
        size = resized(image.size, self.res) if self.crop else (self.res, self.res)  # (W, H)
        box = (0, 0, *size)
        if self.crop == "center":
            box = center_box(size, (self.res, self.res))
        elif self.crop == "random":
            left, top = (int(torch.randint(side - self.res + 1, (), generator=generator)) for side in size)
            box = (left, top, left + self.res, top + self.res)
        image = image.resize(size, RESAMPLING[self.interpolation]).crop(box)
        if label is not None:
            label = label.resize(size, Image.Resampling.NEAREST).crop(box)
        return image, label


def resized(size: tuple[int, int], res: int) -> tuple[int, int]:
    """The shorter side becomes `res`, the longer int(res * long / short)."""
    width, height = size
    if width <= height:
        return res, int(res * height / width)
    return int(res * width / height), res


def center_box(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a centred crop; its offsets are rounded half to even."""
    left, top = (round((side - part) / 2) for side, part in zip(size, crop, strict=True))
    return left, top, left + crop[0], top + crop[1]


def normalise(image: Tensor) -> Tensor:
    """8-bit images (B, 3, H, W) to float32 with the ImageNet mean and standard deviation taken out."""
    mean, std = image.new_tensor((MEAN, STD), dtype=torch.float32)[:, :, None, None]  # (3, 1, 1) each
    return image.float().div_(255).sub_(mean).div_(std)


def to_eight_bit(image: Tensor) -> Tensor:
    """Normalised images back to uint8, floor(255 * (x * std + mean)), as the published CRF sees them.

    The floor is the published code's: on about 1 pixel in 100 it is one below the pixel that was read.
    """
    mean, std = image.new_tensor((MEAN, STD))[:, :, None, None]  # (3, 1, 1) each
    return (255 * (image * std + mean)).floor().clamp_(0, 255).to(torch.uint8)
