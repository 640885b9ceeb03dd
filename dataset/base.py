"""What a data set gives: images and raw labels, before any transform; and items made of them."""

from __future__ import annotations

import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.errors import UserError
from utils.training.randomness import generator
from utils.vision.images import open_image, open_label
from utils.vision.labels import IGNORE
from utils.vision.transforms import Geometry

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
        rule: (256,) int64, class of each raw label value, -1 = ignore, `INVALID` = the rule knows it not.
        cropped: whether the items are crops that were prepared.
        official: number of items that the split officially has, where that is known.
    """

    labelled: bool = True
    rule: np.ndarray
    cropped: bool = False
    official: int | None = None

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

    def place(self, index: int) -> int:
        """The item's place in the whole split, which differs from `index` where items were left out."""
        return index

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


class FileSource(Source):
    """A split whose items are an image file and, where there is one, a label file each.

    Args:
        images: image files.
        targets: the label file of each, or None.
        rule: see `Source`.
    """

    def __init__(self, images: Sequence[Path], targets: Sequence[Path | None], *, rule: np.ndarray) -> None:
        self.images, self.targets, self.rule = images, targets, rule
        self.labelled = any(target is not None for target in targets)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> RawItem:
        """The image and its label, if it has one."""
        image, target = open_image(self.images[index]), self.targets[index]
        return RawItem(image, None if target is None else open_label(target, image.size))

    def label_path(self, index: int) -> Path | None:
        """The file of its label."""
        return self.targets[index]

    def name(self, index: int) -> str:
        """The image's file."""
        return str(self.images[index])


class Kept(Source):
    """Some items of another source, in its order.

    Args:
        whole: the other source.
        places: which of its items.
    """

    def __init__(self, whole: Source, places: Sequence[int]) -> None:
        self.whole, self.places = whole, places
        self.rule, self.labelled, self.cropped = whole.rule, whole.labelled, whole.cropped

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> RawItem:
        """The item."""
        return self.whole.read(self.places[index])

    def name(self, index: int) -> str:
        """Its name."""
        return self.whole.name(self.places[index])

    def label_path(self, index: int) -> Path | None:
        """The file of its label."""
        return self.whole.label_path(self.places[index])

    def place(self, index: int) -> int:
        """Its place in the whole split."""
        return self.whole.place(self.places[index])


def missing_data(root: str | Path, missing: Sequence[str | Path], *, holds: str, prepare: str) -> UserError:
    """The error for a data set that is not where the options say.

    Args:
        root: `dataset.data_path`.
        missing: files or folders that are not there; the first one is named.
        holds: what the folder must hold.
        prepare: what to do, such as the command that fetches it.
    """
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return UserError(
        f"dataset.data_path is {root}: {missing[0]} is missing{more}; the folder must hold {holds}; {prepare}"
    )


def fetch_command(name: str, root: Path) -> str:
    """The command that fills the folder of a published data set, as a shell takes it.

    Args:
        name: what dataset_download.py calls it.
        root: `dataset.data_path`.
    """
    return f"python dataset/dataset_download.py {name} --root {shlex.quote(str(root))}"


def not_there(paths: Sequence[Path]) -> list[Path]:
    """Those of many files that do not exist; each folder is listed once, which is quicker than asking."""
    listed: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        if path.parent not in listed:
            folder = path.parent
            listed[folder] = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
        if path.name not in listed[path.parent]:
            missing.append(path)
    return missing


def classes_of(label: Image.Image, source: Source, index: int) -> np.ndarray:
    """Classes (H, W) int64, -1 = ignore, of the raw label of item `index`.

    Raises:
        UserError: a value that the data set's rule does not know; names the item.
    """
    raw = np.asarray(label)  # (H, W)
    classes = source.rule[raw]
    if (classes == INVALID).any():
        values = np.unique(raw[classes == INVALID]).tolist()
        raise UserError(
            f"{source.label_path(index) or source.name(index)}: the label holds {_ranges(values)}, must hold "
            f"{_ranges(np.flatnonzero(source.rule != INVALID).tolist())}; mend the label or the number of "
            "classes"
        )
    return classes


def _ranges(values: Sequence[int]) -> str:
    """Ascending numbers in words: 0 to 5, 7, 255."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], value]
        else:
            runs.append([value])
    return ", ".join(" to ".join(map(str, run)) for run in runs)


class Batch(NamedTuple):
    """One item, or a batch of them with a leading axis.

    Attributes:
        inputs: (3, H, W) uint8 image, or (T, D) float16 cached tokens.
        label: (H, W) int64, -1 = ignore.
        index: () int64, place in the split.
    """

    inputs: Tensor
    label: Tensor
    index: Tensor

    @property
    def image(self) -> Tensor | None:
        """The image, or None if the tokens are cached."""
        return self.inputs if self.inputs.dtype == torch.uint8 else None


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
        if label is None:
            classes = torch.full((self.geometry.res, self.geometry.res), IGNORE)
        else:
            classes = torch.from_numpy(classes_of(label, self.source, index))
        return Batch(pixels, classes, torch.tensor(index))
