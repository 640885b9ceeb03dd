"""ISPRS Potsdam with 3 classes, as .mat patches of 200 x 200 pixels.

potsdam: labelled_train.txt, labelled_test.txt, imgs/<id>.mat (key img, H x W x 4, of which three channels are
used) and gt/<id>.mat (key gt). potsdamraw: the same below processed/, without lists, <tile>_<row>_<col>.mat.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dataset.base import INVALID, FileSource, RawItem, class_rule, fetch_command, missing_data, not_there
from dataset.matfile import read_array
from utils.config.options import DatasetOptions
from utils.errors import UserError, first_line
from utils.vision.labels import IGNORE, LabelSpace

COARSE_OF_FINE = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2}
IGNORED_ID = 255
LISTS = {"train": "labelled_train.txt", "val": "labelled_test.txt"}
OFFICIAL_SIZES = {"train": 4545, "val": 855, "raw": 38 * 15 * 15}
HOLDS = {
    "potsdam": "labelled_train.txt, labelled_test.txt, imgs/<id>.mat and gt/<id>.mat of Potsdam",
    "potsdamraw": "processed/imgs/<tile>_<row>_<col>.mat and processed/gt/<tile>_<row>_<col>.mat of Potsdam",
}


def labels(options: DatasetOptions) -> LabelSpace:
    """Three classes, of two fine ones each."""
    names = ("roads and cars", "buildings and clutter", "trees and vegetation")
    return LabelSpace(names, ((128, 64, 128), (222, 184, 60), (60, 160, 70)))


class Potsdam(FileSource):
    """One split of Potsdam.

    Args:
        options: `dataset.*`; data_type potsdam or potsdamraw (whose splits are the same patches).
        split: "train" or "val".

    Raises:
        UserError: the list or the patches are missing or, unless damaged files are to be left out, one of
            them is.
    """

    def __init__(self, options: DatasetOptions, split: str) -> None:
        root, kind = Path(options.data_path), options.data_type
        words = {
            "holds": HOLDS[kind],
            "prepare": f"fetch it with: {fetch_command(kind, root)}",
        }
        if kind == "potsdamraw":
            below, first = root / "processed", root / "processed/imgs/*.mat"
            ids = sorted(path.stem for path in (below / "imgs").glob("*.mat"))
        else:
            below, first = root, root / LISTS[split]
            ids = _listed(first)
            if first.is_file() and not ids:
                raise UserError(f"{first}: names no patch, must hold one id a line; {words['prepare']}")
        images = [below / "imgs" / f"{name}.mat" for name in ids]
        targets = [below / "gt" / f"{name}.mat" for name in ids]
        missing = not_there([*images, *targets]) if ids else [first]
        if missing and not (ids and options.skip_damaged):
            raise missing_data(root, missing, **words)
        rule = class_rule(COARSE_OF_FINE | {IGNORED_ID: IGNORE}, other=INVALID)
        super().__init__(images, targets, rule=rule)
        self.official = OFFICIAL_SIZES["raw" if kind == "potsdamraw" else split]

    def read(self, index: int) -> RawItem:
        """The patch and its fine labels."""
        image, target = _image(self.images[index]), _target(self.targets[index])
        if target.shape != image.shape[:2]:
            raise UserError(
                f"{self.targets[index]}: label is {target.shape} (rows, columns), its image is "
                f"{image.shape[:2]}; make them equal"
            )
        return RawItem(Image.fromarray(image), Image.fromarray(target))


def _listed(path: Path) -> list[str]:
    """The ids in a list; none where there is no such file."""
    try:
        return path.read_text(encoding="utf-8").split() if path.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable list ({first_line(error)}); fetch it again") from None


def _image(path: Path) -> np.ndarray:
    """The first three of its channels, (H, W, 3) uint8."""
    found = _read(path, "img", ndim=3)
    if found.shape[2] < 3 or found.min() < 0 or found.max() > 255:
        raise UserError(
            f"{path}: entry 'img' is {found.shape} with values {found.min()} to {found.max()}, must be "
            "(H, W, 3 or 4) with values 0 to 255; mend or remove it"
        )
    return np.ascontiguousarray(found[:, :, :3].astype(np.uint8))


def _target(path: Path) -> np.ndarray:
    """The fine ids, (H, W) uint8; negative ones are ignored, as 255 is."""
    found = _read(path, "gt", ndim=2)
    if found.max() > IGNORED_ID:
        raise UserError(f"{path}: the label holds {found.max()}, must hold 0 to 5, 255; mend or remove it")
    return np.where(found < 0, IGNORED_ID, found).astype(np.uint8)


def _read(path: Path, key: str, *, ndim: int) -> np.ndarray:
    try:
        found = read_array(path, key)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable .mat file ({first_line(error)}); fetch it again") from None
    if found is None:
        raise UserError(f"{path}: entry {key!r} is missing, must be an array of numbers with {ndim} axes")
    if found.ndim != ndim or not found.size:
        raise UserError(f"{path}: entry {key!r} is of shape {found.shape}, must have {ndim} axes")
    if not np.isfinite(found).all():
        raise UserError(f"{path}: entry {key!r} holds NaN or infinite values; mend or remove it")
    return found
