"""ISPRS Potsdam with 3 classes, as .mat patches of 200 x 200 pixels.

potsdam: labelled_train.txt, labelled_test.txt, imgs/<id>.mat (key img, H x W x 4, of which the first three
channels are used) and gt/<id>.mat (key gt). potsdamraw: imgs/ and gt/ below processed/, without lists, so
both splits are all patches; those of the tiles whose labels ISPRS withheld have no gt.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from dataset.base import FileSource, RawItem, class_rule, require_files
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
            images = sorted(root.glob("imgs/[!.]*.mat"))
            found = {path.name: path for path in root.glob("gt/*.mat")}
            targets = [found.get(path.name) for path in images]
            parts = {"imgs": images, "gt": found}
            require_files(options, [root / f"{part}/*.mat" for part, files in parts.items() if not files])
        else:
            listing = root / f"labelled_{'train' if split == 'train' else 'test'}.txt"
            require_files(options, [listing])
            images = [root / "imgs" / f"{name}.mat" for name in listing.read_text().split()]
            targets = [root / "gt" / path.name for path in images]
            require_files(options, [*images, *targets], unless=options.skip_damaged)
        super().__init__(images, targets, rule=class_rule(COARSE_OF_FINE, ignored=[255]))

    def read(self, index: int) -> RawItem:
        """Reads a patch and its six-class label."""
        _, path = self.files(index)
        if path is None:
            return RawItem(self.read_image(index), None)
        target = _load(path, "gt")
        target = np.where(target < 0, 255, target).astype(np.uint8)  # (H, W)
        return RawItem(self.read_image(index), Image.fromarray(target))

    def read_image(self, index: int) -> Image.Image:
        """Reads a patch alone."""
        image = _load(self.files(index)[0], "img")[:, :, :3]  # (H, W, 3)
        return Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8))


def _load(path: Path, key: str) -> np.ndarray:
    try:
        return loadmat(path)[key]
    except Exception as error:  # scipy documents no exception types
        message = f"not a readable .mat file ({first_line(error)}); download it again"
        raise UserError(f"{path}: {message}") from None
