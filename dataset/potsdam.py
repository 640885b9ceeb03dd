"""ISPRS Potsdam with 3 classes, as .mat patches of 200 x 200 pixels.

potsdam: labelled_train.txt, labelled_test.txt, imgs/<id>.mat (key img, H x W x 4, of which three channels are
used) and gt/<id>.mat (key gt). potsdamraw: the same below processed/, without lists, <tile>_<row>_<col>.mat.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from dataset.source import RawItem, Source, class_rule
from utils.errors import UserError, first_line
from utils.labels import LabelSpace
from utils.options import DatasetOptions

COARSE_OF_FINE = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2}
LISTS = {"train": "labelled_train.txt", "val": "labelled_test.txt"}


def labels(options: DatasetOptions) -> LabelSpace:
    """Three classes, of two fine ones each."""
    names = ("roads and cars", "buildings and clutter", "trees and vegetation")
    return LabelSpace(names, ((128, 64, 128), (222, 184, 60), (60, 160, 70)))


class Potsdam(Source):
    """One split of Potsdam.

    Args:
        options: `dataset.*`; data_type potsdam or potsdamraw (whose splits are the same patches).
        split: "train" or "val".

    Raises:
        UserError: the list or the patches are not there.
    """

    def __init__(self, options: DatasetOptions, split: str) -> None:
        root = Path(options.data_path)
        if options.data_type == "potsdamraw":
            root = root / "processed"
            self.ids = sorted(path.stem for path in (root / "imgs").glob("*.mat"))
            first = root / "imgs" / "*.mat"
        else:
            first = root / LISTS[split]
            self.ids = first.read_text().split() if first.is_file() else []
        if not self.ids:
            raise UserError(
                f"dataset.data_path is {options.data_path}: {first} is missing or empty; the folder must "
                "hold the lists, imgs/ and gt/ of Potsdam"
            )
        self.images, self.targets = root / "imgs", root / "gt"
        self.rule = class_rule(COARSE_OF_FINE)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> RawItem:
        """The patch and its fine labels."""
        image = _read(self.images / f"{self.ids[index]}.mat", "img", ndim=3)[:, :, :3].astype(np.uint8)
        target = _read(self.targets / f"{self.ids[index]}.mat", "gt", ndim=2)
        if target.shape != image.shape[:2]:
            raise UserError(f"{self.name(index)}: image is {image.shape[:2]}, its label {target.shape}")
        target = np.where((target < 0) | (target > 255), 255, target).astype(np.uint8)
        return RawItem(Image.fromarray(np.ascontiguousarray(image)), Image.fromarray(target))

    def label_path(self, index: int) -> Path:
        """The file of its label."""
        return self.targets / f"{self.ids[index]}.mat"

    def name(self, index: int) -> str:
        """The patch's file."""
        return str(self.images / f"{self.ids[index]}.mat")


def _read(path: Path, key: str, *, ndim: int) -> np.ndarray:
    try:
        content = loadmat(path)
    except Exception as error:  # a damaged file raises zlib's, struct's and scipy's own errors
        raise UserError(f"{path}: not a readable .mat file ({first_line(error)})") from None
    found = content.get(key)
    if found is None or found.ndim != ndim:
        shape = "missing" if found is None else f"of shape {found.shape}"
        raise UserError(f"{path}: entry {key!r} is {shape}, must be an array of {ndim} axes")
    return found
