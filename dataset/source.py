"""What a data set gives: images and raw labels, before any transform; and items made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from utils.errors import UserError
from utils.labels import IGNORE
from utils.randomness import generator
from utils.transforms import Geometry

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
INVALID = -2  # a raw label value that the data set's rule does not know


@dataclass(frozen=True)
class RawItem:
    """An image (mode RGB) and its raw label (mode L, the same size), or None where there is no label."""

    image: Image.Image
    label: Image.Image | None


class Source(ABC):
    """The images of one split.

    Attributes:
        labelled: whether any item has a label.
        rule: (256,) int64, class of each raw label value, -1 = ignore.
    """

    labelled: bool = True
    rule: np.ndarray

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> RawItem:
        """The raw item."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the item in an error."""

    def label_path(self, index: int) -> Path | None:
        """The file of the item's label, where there is one."""
        return None

    def stamp(self, index: int) -> str:
        """Names, sizes and times of change of the item's files: what a cache is held against."""
        words = []
        for path in (self.name(index), self.label_path(index)):
            words.append(str(path))
            try:
                status = Path(path or "").stat()
            except OSError:
                continue
            words.append(f"{status.st_size} {status.st_mtime_ns}")
        return " ".join(words)


def class_rule(mapping: dict[int, int], *, other: int = IGNORE) -> np.ndarray:
    """A rule (256,) int64 from raw value to class; `other` for all values that are not named."""
    rule = np.full(256, other, dtype=np.int64)
    for raw, class_id in mapping.items():
        rule[raw] = class_id
    return rule


def open_image(path: Path) -> Image.Image:
    """An image file as RGB, upright.

    Raises:
        UserError: the file is missing or damaged; names it.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable image ({error}); mend or remove it") from None
    if mode.startswith(("I", "F")):
        raise UserError(f"{path}: image mode is {mode}, must have 8 bits a channel; convert it")
    return upright


def open_label(path: Path, size: tuple[int, int]) -> Image.Image:
    """A label file as 8-bit class values.

    Args:
        path: an 8-bit greyscale or palette image.
        size: (W, H) of its image.

    Raises:
        UserError: missing, damaged, of another size or mode.
    """
    try:
        with Image.open(path) as label:
            label.load()
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable label ({error}); mend or remove it") from None
    if label.mode not in ("L", "P"):
        raise UserError(
            f"{path}: label mode is {label.mode}, must be 8-bit greyscale or palette, one id a pixel"
        )
    if label.size != size:
        raise UserError(
            f"{path}: label is {label.size} (width, height), its image is {size}; make them equal"
        )
    return label if label.mode == "L" else Image.frombytes("L", label.size, label.tobytes())


class Batch(NamedTuple):
    """One item, or a batch of them with a leading axis.

    Attributes:
        image: (3, H, W) uint8.
        label: (H, W) int64, -1 = ignore.
        index: () int64, place in the split.
    """

    image: Tensor
    label: Tensor
    index: Tensor


class SegmentationDataset(Dataset):
    """Items of a source at one resolution.

    An item is asked for by (epoch, index), so that a random crop is a function of seed, epoch and index.

    Args:
        source: where raw items come from.
        geometry: resize and crop.
        seed: of random crops.
    """

    def __init__(self, source: Source, geometry: Geometry, *, seed: int = 0) -> None:
        self.source, self.geometry, self.seed = source, geometry, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        raw = self.source.read(index)
        drawn = generator(self.seed, "crop", epoch, index) if self.geometry.crop == "random" else None
        image, label = self.geometry(raw.image, raw.label, drawn)
        pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())  # (3, H, W)
        return Batch(pixels, self._classes(label, index), torch.tensor(index))

    def _classes(self, label: Image.Image | None, index: int) -> Tensor:
        if label is None:
            return torch.full((self.geometry.res, self.geometry.res), IGNORE)
        raw = np.asarray(label)  # (H, W)
        classes = self.source.rule[raw]
        if (classes == INVALID).any():
            value = int(raw[classes == INVALID][0])
            known = np.flatnonzero(self.source.rule != INVALID).tolist()
            raise UserError(
                f"{self.source.name(index)}: its label holds {value}, must be one of {known}; mend the label "
                "or the number of classes"
            )
        return torch.from_numpy(classes)
