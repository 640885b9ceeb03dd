"""ISPRS Potsdam with 3 classes, as .mat patches of 200 x 200 pixels.

potsdam: labelled_train.txt, labelled_test.txt, imgs/<id>.mat (key img, H x W x 4, of which the first three
channels are used) and gt/<id>.mat (key gt). potsdamraw: imgs/ and gt/ below processed/, without lists, so
both splits are all patches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from dataset.base import FileSource, RawItem, class_rule, missing_data, read_ids, require_files
from utils.config.options import DatasetOptions
from utils.errors import UserError, first_line
from utils.vision.labels import LabelSpace

COARSE_OF_FINE = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2}


def labels(options: DatasetOptions) -> LabelSpace:
    """Three classes, each of two official ones."""
    names = ("roads and cars", "buildings and clutter", "trees and vegetation")
    return LabelSpace(names, ((128, 64, 128), (222, 184, 60), (60, 160, 70)))


class Potsdam(FileSource):
    """One split, "train" or "val"."""

    def __init__(self, options: DatasetOptions, split: str) -> None:
        root = Path(options.data_path)
        if options.data_type == "potsdamraw":
            root /= "processed"
            ids = sorted(path.stem for path in root.glob("imgs/*.mat"))
            if not ids:
                raise missing_data(options, root / "imgs/*.mat")
        else:
            ids = read_ids(options, root / f"labelled_{'train' if split == 'train' else 'test'}.txt")
        images, targets = ([root / folder / f"{name}.mat" for name in ids] for folder in ("imgs", "gt"))
        require_files(options, [*images, *targets])
        super().__init__(images, targets, rule=class_rule(COARSE_OF_FINE, ignored=[255]))

    def read(self, index: int) -> RawItem:
        """Reads a patch and its six-class label."""
        image = _read_array(self.images[index], "img")[:, :, :3].astype(np.uint8)  # (H, W, 3)
        target = _read_array(self.targets[index], "gt")  # (H, W), negative: ignored
        target = np.where(target < 0, 255, target).astype(np.uint8)
        return RawItem(Image.fromarray(np.ascontiguousarray(image)), Image.fromarray(target))


def _read_array(path: Path, key: str) -> np.ndarray:
    try:
        return loadmat(path, variable_names=[key])[key]
    except Exception as error:  # scipy documents no exception types
        raise UserError(
            f"{path}: not a readable .mat file with the entry {key} ({first_line(error)}); download it again"
        ) from None
