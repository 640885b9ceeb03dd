"""Sources of raw images and labels, and the data set that makes training items of them."""

from __future__ import annotations

import hashlib
import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.config.options import DatasetOptions
from utils.errors import UserError
from utils.training.randomness import generator
from utils.vision.images import open_image, open_label
from utils.vision.labels import IGNORE
from utils.vision.transforms import Geometry

INVALID = -1  # in a rule: a raw label value that must not occur


class RawItem(NamedTuple):
    """An RGB image and its raw label (mode L, same size), or None if it has no label."""

    image: Image.Image
    label: Image.Image | None


class Source(ABC):
    """Raw images and labels of one split.

    Attributes:
        rule: (256,) int64, raw label value -> class; see `class_rule`.
        labelled: whether any item has a label.
        official_size: number of items in the official split, if known.
    """

    rule: np.ndarray
    labelled: bool = True
    official_size: int | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> RawItem:
        """Reads an item."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The image file of an item, or a name for error messages."""

    def label_path(self, index: int) -> Path | None:
        """The label file of an item, if it has one."""
        return None

    def original_index(self, index: int) -> int:
        """Index in the complete split; only a `Subset` differs from `index`."""
        return index

    def digest(self) -> str:
        """SHA-256 of the label rule and of each file's name, size and modification time."""
        digest = hashlib.sha256(repr((self.labelled, self.rule.tolist())).encode())
        for index in range(len(self)):
            for path in filter(None, (self.name(index), self.label_path(index))):
                digest.update(str(path).encode())
                if os.path.isfile(path):
                    status = os.stat(path)
                    digest.update(f" {status.st_size} {status.st_mtime_ns} ".encode())
        return digest.hexdigest()


def class_rule(mapping: dict[int, int], *, ignored: Iterable[int] | None = None) -> np.ndarray:
    """The class of each raw label value, (256,) int64.

    Args:
        mapping: raw value -> class.
        ignored: raw values to ignore, in which case all others are errors; None ignores all others.
    """
    rule = np.full(256, IGNORE if ignored is None else INVALID, dtype=np.int64)
    rule[list(ignored or ())] = IGNORE
    rule[list(mapping)] = list(mapping.values())
    return rule


class FileSource(Source):
    """A split of image files and label files.

    Args:
        images: image files.
        targets: the label file of each image, or None.
        rule: see `Source`.
    """

    def __init__(self, images: Sequence[Path], targets: Sequence[Path | None], *, rule: np.ndarray) -> None:
        self.images, self.targets, self.rule = images, targets, rule
        self.labelled = any(target is not None for target in targets)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> RawItem:
        """Reads an image and its label."""
        image, target = open_image(self.images[index]), self.targets[index]
        return RawItem(image, None if target is None else open_label(target, image.size))

    def label_path(self, index: int) -> Path | None:
        """The label file."""
        return self.targets[index]

    def name(self, index: int) -> str:
        """The image file."""
        return str(self.images[index])


class Subset(Source):
    """The items of another source at `indices`."""

    def __init__(self, whole: Source, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, indices
        self.rule, self.labelled = whole.rule, whole.labelled

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> RawItem:
        """Reads an item."""
        return self.whole.read(self.indices[index])

    def name(self, index: int) -> str:
        """Its name in the other source."""
        return self.whole.name(self.indices[index])

    def label_path(self, index: int) -> Path | None:
        """Its label file."""
        return self.whole.label_path(self.indices[index])

    def original_index(self, index: int) -> int:
        """Its index in the complete split."""
        return self.whole.original_index(self.indices[index])


def missing_data(options: DatasetOptions, missing: Sequence[Path]) -> UserError:
    """The error for a downloadable data set in which files are missing; names the first."""
    name = options.data_type.rstrip("0123456789")  # cocostuff27 -> cocostuff
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return UserError(
        f"dataset.data_path is {options.data_path}: {missing[0]} is missing{more}; download it with: "
        f"python dataset/dataset_download.py {name} --root {shlex.quote(options.data_path)} "
        "(dataset/README.md shows the layout)"
    )


def read_ids(options: DatasetOptions, listing: Path) -> list[str]:
    """The ids in a list file, one per line; raises a UserError if it is missing or empty."""
    if not listing.is_file():
        raise missing_data(options, [listing])
    if not (ids := listing.read_text().split()):
        raise UserError(f"{listing}: is empty, must hold one id per line; download it again")
    return ids


def require_files(options: DatasetOptions, paths: Sequence[Path]) -> None:
    """Raises a UserError if a file is missing, unless `dataset.skip_damaged` is set."""
    # listing each folder once is much faster than a stat per file on network disks
    folders = {path.parent for path in paths}
    present = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    missing = [path for path in paths if path not in present]
    if missing and not options.skip_damaged:
        raise missing_data(options, missing)


def classes_of(label: Image.Image, source: Source, index: int) -> np.ndarray:
    """Maps the raw label of item `index` to classes, (H, W) int64, 255 = ignore.

    Raises:
        UserError: a value that the source's rule does not allow; names the file.
    """
    raw = np.asarray(label)  # (H, W)
    classes = source.rule[raw]
    if (classes == INVALID).any():
        found = _ranges(np.unique(raw[classes == INVALID]).tolist())
        allowed = _ranges(np.flatnonzero(source.rule != INVALID).tolist())
        raise UserError(
            f"{source.label_path(index) or source.name(index)}: the label holds {found}, must hold "
            f"{allowed}; fix the label or the number of classes"
        )
    return classes


def _ranges(values: Sequence[int]) -> str:
    """Ascending numbers as text: 0 to 5, 7, 255."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], value]
        else:
            runs.append([value])
    return ", ".join(" to ".join(map(str, run)) for run in runs)


class Batch(NamedTuple):
    """One item, or a batch of items with a leading axis.

    Attributes:
        inputs: images (3, H, W) uint8, or the frozen backbone's cached tokens (T, D) float16.
        label: (H, W) int64, 255 = ignore.
        index: () int64, index in the split.
    """

    inputs: Tensor
    label: Tensor
    index: Tensor

    @property
    def image(self) -> Tensor | None:
        """The images, or None if the inputs are cached tokens."""
        return self.inputs if self.inputs.dtype == torch.uint8 else None


class SegmentationDataset(Dataset):
    """Items of a source at one resolution.

    Items are indexed by (epoch, index), so that a random crop depends on seed, epoch and index alone.

    Args:
        source: raw items.
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
