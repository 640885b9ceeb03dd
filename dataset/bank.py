"""The images whose patches an anchor is held against when one is explained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.base import SegmentationDataset
from dataset.datamodule import SegmentationDataModule
from utils.errors import UserError
from utils.vision.images import open_image


@dataclass(frozen=True)
class BankImages:
    """An image that is asked for and others, as many as a training batch has.

    Attributes:
        images: (B, 3, H, W) uint8, the one that is asked for first.
        names: B files, or what stands for them.
        split: that the others are of, "validation" or "train".
    """

    images: Tensor
    names: tuple[str, ...]
    split: str

    @property
    def about(self) -> str:
        """The bank in words."""
        others = len(self.images) - 1
        if not others:
            return "bank: this image alone"
        return f"bank: {others + 1} images, this one and {others} of the {self.split} split"


def bank_images(data: SegmentationDataModule, image: str, *, size: int) -> BankImages:
    """An image with others spread over the validation split; over the train split where that is empty.

    Args:
        data: the data set; all images take the geometry of its validation split.
        image: an image file, or the index of a validation image.
        size: B at most.

    Raises:
        UserError: there is no such image, or a file is damaged.
    """
    split, others = _others(data)
    place = _place(image, data, others)
    if place is None:
        if not Path(image).is_file():
            raise UserError(
                f"--explain is {image}: no such file; name an image file, or give a validation image's index"
            )
        pixels, _ = data.validation_set.geometry(open_image(Path(image)), None)
        asked = torch.from_numpy(np.asarray(pixels).transpose(2, 0, 1).copy())  # (3, H, W)
        name = image
    else:
        asked, name = others[place].image, others.source.name(place)
    free = [other for other in range(len(others) if others else 0) if other != place]
    count = min(size - 1, len(free))
    chosen = [free[number * len(free) // count] for number in range(count)]  # spread over the split
    images = torch.stack([asked, *(others[other].image for other in chosen)])  # (B, 3, H, W)
    return BankImages(images, (name, *(others.source.name(other) for other in chosen)), split)


def _place(image: str, data: SegmentationDataModule, others: SegmentationDataset | None) -> int | None:
    """Where the split that the bank is of has the image: an index of validation, or a file of that split."""
    if re.fullmatch(r"-?\d+", image):
        length = len(data.validation_set)
        if not 0 <= int(image) < length:
            there = f"must be 0 to {length - 1}" if length else "but there are no validation images"
            raise UserError(f"--explain is {image}, {there}; give another index or name an image file")
        return int(image)
    path = Path(image).resolve()
    names = (others.source.name(index) for index in range(len(others) if others else 0))
    return next((index for index, name in enumerate(names) if Path(name).resolve() == path), None)


def _others(data: SegmentationDataModule) -> tuple[str, SegmentationDataset | None]:
    """The split that has images, and it at the geometry of validation; None where neither has."""
    if len(data.validation_set):
        return "validation", data.validation_set
    try:
        source = data.kind.source(data.options.dataset, "train")
    except UserError:  # a folder without train images: the image that is asked for is enough
        return "train", None
    return "train", SegmentationDataset(source, data.validation_set.geometry)
