"""Joint transforms of image and label, and the ImageNet normalisation.

Images are resized with Pillow, because its NEAREST selects different pixels than torch's.
"""

from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic")}


@dataclass(frozen=True)
class Geometry:
    """Resizes and crops an image and its label to res x res pixels."""

    res: int
    crop: str | None = "center"  # "center" or "random": resize the shorter side to `res`; None: squash
    interpolation: str = "nearest"  # of the image; the label is always nearest

    def __call__(
        self, image: Image.Image, label: Image.Image | None, generator: torch.Generator | None = None
    ) -> tuple[Image.Image, Image.Image | None]:
        """Applies the same resize and crop to an image in mode RGB and its label in mode L."""
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
    """The size (W, H) whose shorter side is `res`; the longer is int(res * long / short)."""
    return tuple(int(res * side / min(size)) for side in size)


def center_box(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a centre crop; offsets are rounded half to even."""
    left, top = (round((side - part) / 2) for side, part in zip(size, crop, strict=True))
    return left, top, left + crop[0], top + crop[1]


@cache
@torch.inference_mode(False)
def _mean_and_std(device: torch.device) -> Tensor:
    """(2, 3, 1, 1) float32; kept on the device, as each upload would wait for it."""
    return torch.tensor((MEAN, STD), device=device)[:, :, None, None]


def normalise(image: Tensor) -> Tensor:
    """8-bit images (B, 3, H, W) to float32, normalised with the ImageNet mean and standard deviation."""
    mean, std = _mean_and_std(image.device)
    return image.float().div_(255).sub_(mean).div_(std)


def to_eight_bit(image: Tensor) -> Tensor:
    """Normalised images to uint8 for the published CRF; the floor lowers about 1% of the values by one."""
    mean, std = _mean_and_std(image.device)
    return (255 * (image * std + mean)).floor().clamp_(0, 255).to(torch.uint8)
