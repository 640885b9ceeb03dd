"""ISPRS Potsdam with 3 classes, as .mat patches of 200 x 200 pixels.

potsdam: labelled_train.txt, labelled_test.txt, imgs/<id>.mat (key img, H x W x 4, of which the first three
channels are used) and gt/<id>.mat (key gt). potsdamraw: imgs/ and gt/ below processed/, without lists.
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
IGNORED_ID = 255
LISTS = {"train": "labelled_train.txt", "val": "labelled_test.txt"}
OFFICIAL_SIZES = {"train": 4545, "val": 855, "raw": 38 * 15 * 15}


def labels(options: DatasetOptions) -> LabelSpace:
    """Three classes, each of two official ones."""
    names = ("roads and cars", "buildings and clutter", "trees and vegetation")
    return LabelSpace(names, ((128, 64, 128), (222, 184, 60), (60, 160, 70)))


class Potsdam(FileSource):
    """One split, "train" or "val"; raises a UserError if the list or a patch is missing.

    Both splits of potsdamraw are all patches.
    """

    def __init__(self, options: DatasetOptions, split: str) -> None:
        root, kind = Path(options.data_path), options.data_type
        if kind == "potsdamraw":
            root = root / "processed"
            ids = sorted(path.stem for path in (root / "imgs").glob("*.mat"))
            if not ids:
                raise missing_data(options, [root / "imgs/*.mat"])
        else:
            ids = read_ids(options, root / LISTS[split])
        images = [root / "imgs" / f"{name}.mat" for name in ids]
        targets = [root / "gt" / f"{name}.mat" for name in ids]
        require_files(options, [*images, *targets])
        super().__init__(images, targets, rule=class_rule(COARSE_OF_FINE, ignored=[IGNORED_ID]))
        self.official_size = OFFICIAL_SIZES["raw" if kind == "potsdamraw" else split]

    def read(self, index: int) -> RawItem:
        """Reads a patch and its six-class label."""
        path = self.targets[index]
        image = _read_array(self.images[index], "img", ndim=3)[:, :, :3].astype(np.uint8)  # (H, W, 3)
        target = _read_array(path, "gt", ndim=2)  # (H, W)
        if target.shape != image.shape[:2]:
            raise UserError(
                f"{path}: label is {target.shape} (rows, columns), its image is {image.shape[:2]}; "
                "make them equal"
            )
        target = np.where(target < 0, IGNORED_ID, target).astype(np.uint8)
        return RawItem(Image.fromarray(np.ascontiguousarray(image)), Image.fromarray(target))


def _read_array(path: Path, key: str, *, ndim: int) -> np.ndarray:
    try:
        array = loadmat(path, variable_names=[key]).get(key)
    except Exception as error:  # scipy documents no exception types
        raise UserError(
            f"{path}: not a readable .mat file ({first_line(error)}); download it again"
        ) from None
    if array is None or array.ndim != ndim or array.dtype.kind not in "uif":
        found = "missing" if array is None else f"{array.dtype} of shape {array.shape}"
        raise UserError(f"{path}: entry {key!r} is {found}, must be numeric with {ndim} axes; replace it")
    return array
