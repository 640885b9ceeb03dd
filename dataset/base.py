"""Sources of raw images and labels, and the data set that makes training items of them."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset.crops import CROPS, crop_boxes
from utils.config.loading import download_hint
from utils.config.options import DatasetOptions
from utils.errors import UserError
from utils.files import printable
from utils.progress import Bar
from utils.training.randomness import generator
from utils.vision.images import open_image, open_label
from utils.vision.labels import IGNORE, LabelSpace
from utils.vision.transforms import Geometry

INVALID = -1  # in a rule: a raw label value that must not occur


class RawItem(NamedTuple):
    """An RGB image and its raw label (mode L, same size), or None if it has no label."""

    image: Image.Image
    label: Image.Image | None


class Source(ABC):
    """Raw images and labels of one split."""

    rule: np.ndarray  # (256,) int64, raw label value -> class; see `class_rule`
    labelled: bool = True  # whether any item has a label

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> RawItem:
        """Reads an item."""

    def read_image(self, index: int) -> Image.Image:
        """Reads the image alone."""
        return self.read(index).image

    @abstractmethod
    def name(self, index: int) -> str:
        """The image file of an item, or a name for error messages."""

    def files(self, index: int) -> tuple[str | Path, Path | None]:
        """Image and label file of an item, if it has one."""
        return self.name(index), None

    def digest(self) -> str:
        """SHA-256 of the label rule and of each file's name, size and modification time."""
        files = [(path, found and (found.st_size, found.st_mtime_ns)) for path, found in self._stats()]
        return hashlib.sha256(repr((self.labelled, self.rule.tolist(), files)).encode()).hexdigest()

    def inventory(self, root: str) -> dict[str, int]:
        """Size in bytes of each file by its name below `root`; the number of items if there are no files."""
        root = str(Path(root))  # without the "/" of a completed command line
        sizes = {path.removeprefix(f"{root}/"): found.st_size for path, found in self._stats() if found}
        return sizes or {"items": len(self)}

    def _stats(self) -> Iterator[tuple[str, os.stat_result | None]]:
        """Yields each path, with its status if it exists; in threads, as network disks are slow."""
        paths = self._paths()
        with ThreadPool(16) as pool:
            found = pool.imap(_stat, paths, chunksize=256)
            bar = Bar(found, total=len(paths), desc="file sizes", delay=2, leave=False)
            yield from zip(paths, bar, strict=True)

    def _paths(self) -> list[str]:
        return [str(path) for i in range(len(self)) for path in self.files(i) if path]


def _stat(path: str) -> os.stat_result | None:
    with suppress(OSError):
        return os.stat(path)
    return None


class FileSource(Source):
    """A split of image files, and the label file of each image or None.

    `upright` applies the EXIF orientation of the images.
    """

    upright = True

    def __init__(
        self, images: Iterable[Path | str], targets: Iterable[Path | str | None], *, rule: np.ndarray
    ) -> None:
        # in an array, b"" for None: with lists, reference counting makes each worker copy their memory
        names = [os.fsencode(path or "") for path in (*images, *targets)]
        self._names = np.array(names, dtype=bytes).reshape(2, -1).T  # (n, 2)
        self.labelled, self.rule = any(self._names[:, 1].tolist()), rule

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> RawItem:
        """Reads an image and its label."""
        image, (_, target) = self.read_image(index), self.files(index)
        return RawItem(image, None if target is None else open_label(target, image.size))

    def read_image(self, index: int) -> Image.Image:
        """Reads the image alone."""
        return open_image(self.files(index)[0], upright=self.upright)

    def name(self, index: int) -> str:
        """The image file."""
        return printable(self.files(index)[0])

    def files(self, index: int) -> tuple[Path, Path | None]:
        """Image and label."""
        image, target = map(os.fsdecode, self._names[index])
        return Path(image), Path(target) if target else None

    def _paths(self) -> list[str]:
        return [os.fsdecode(name) for name in self._names.ravel().tolist() if name]


class DataSetKind(NamedTuple):
    """A registered data set: its classes and, by split, its items."""

    labels: Callable[[DatasetOptions], LabelSpace]
    source: Callable[[DatasetOptions, str], Source]
    cropped: bool = True  # whether `dataset.crop_type` applies


def class_rule(mapping: dict[int, int], *, ignored: Iterable[int] | None = None) -> np.ndarray:
    """The class of each raw label value, (256,) int64; others are ignored, or errors with `ignored`."""
    rule = np.full(256, IGNORE if ignored is None else INVALID, dtype=np.int64)
    rule[list(ignored or ())] = IGNORE
    rule[list(mapping)] = list(mapping.values())
    return rule


def classes_of(item: RawItem, source: Source, index: int) -> np.ndarray:
    """Maps the raw label of item `index` to classes, (H, W) uint8, 255 = ignore; all 255 without a label."""
    if item.label is None:
        return np.full(item.image.size[::-1], IGNORE, dtype=np.uint8)
    raw = np.asarray(item.label)  # (H, W)
    classes = source.rule[raw]
    if (classes == INVALID).any():
        listed = partial(np.array2string, threshold=9, separator=", ", formatter={"int": str})
        found, allowed = np.unique(raw[classes == INVALID]), np.flatnonzero(source.rule != INVALID)
        raise UserError(
            f"{source.files(index)[1] or source.name(index)}: the label holds {listed(found)}, must hold "
            f"only {listed(allowed)}; fix the label or the number of classes"
        )
    return classes.astype(np.uint8)


def require_files(options: DatasetOptions, paths: Sequence[Path], *, unless: bool = False) -> None:
    """Raises a UserError that names the first missing file and how to download the data set."""
    folders = set(map(os.path.dirname, paths))  # listing one is faster than a stat per file on network disks
    present = {folder: set(os.listdir(folder)) for folder in folders if os.path.isdir(folder)}
    missing = [path for path in paths if path.name not in present.get(os.path.dirname(path), ())]
    if missing and not unless:
        hint = download_hint(options.data_type, options.data_path)
        raise UserError(
            f"dataset.data_path is {options.data_path}: {missing[0]} is missing{hint} "
            "(dataset/README.md shows the layout)"
        )


class Batch(NamedTuple):
    """One item, or a batch of items with a leading axis."""

    inputs: Tensor  # images (3, H, W) uint8, or the frozen backbone's cached tokens (T, D) float16
    label: Tensor  # (H, W) uint8, 255 = ignore
    index: Tensor  # () int64, index in the split

    @property
    def image(self) -> Tensor | None:
        """The images, or None if the inputs are cached tokens."""
        return self.inputs if self.inputs.dtype == torch.uint8 else None


@dataclass(eq=False)
class SegmentationDataset(Dataset):
    """Items of a source at one resolution, by index or (epoch, index)."""

    source: Source
    geometry: Geometry  # resize and crop; a random crop depends on seed, epoch and index alone
    seed: int = 0
    crops: tuple[float, str] | None = None  # ratio and kind: item 5 * i + k is crop k of image i
    kept: Sequence[int] | None = None  # indices in the source of the images to use; None: all
    hides_labels: bool = False
    _last: tuple[int, RawItem | None] = (-1, None)  # crops that are read in a row share a decode

    def __post_init__(self) -> None:
        if self.kept is None:
            self.kept = range(len(self.source))

    def __len__(self) -> int:
        return len(self.kept) * (CROPS if self.crops else 1)

    def _position(self, index: int) -> int:
        return self.kept[index // CROPS if self.crops else index]

    def name(self, index: int) -> str:
        """The image of an item."""
        return self.source.name(self._position(index))

    def _read(self, position: int) -> RawItem:
        if self._last[0] != position or not self.crops:
            self._last = -1, None  # frees its memory before the next image is decoded
            hidden, source = self.hides_labels, self.source
            try:  # a hidden label is not read
                item = RawItem(source.read_image(position), None) if hidden else source.read(position)
            except UserError as error:
                raise UserError(f"{error}; dataset.skip_damaged=true skips all damaged files") from None
            self._last = position, item
        return self._last[1]

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        source, position = self.source, self._position(index)
        image, label = self._read(position)
        if self.crops:
            box = crop_boxes(image.size, *self.crops, position)[index % CROPS]
            image, label = image.crop(box), None if label is None else label.crop(box)
        drawn = generator(self.seed, "crop", epoch, index) if self.geometry.crop == "random" else None
        item = RawItem(*self.geometry(image, label, drawn))
        pixels = torch.from_numpy(np.asarray(item.image).transpose(2, 0, 1).copy())  # (3, H, W)
        classes = classes_of(item, source, position)
        return Batch(pixels, torch.from_numpy(classes), torch.tensor(index))
