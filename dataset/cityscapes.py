"""Cityscapes (Cordts et al., CVPR 2016), fine annotations, 27 classes: official labelId - 7, others ignored.

Layout below data_path, as torchvision reads it: leftImg8bit/<split>/<city>/*_leftImg8bit.png and
gtFine/<split>/<city>/*_gtFine_labelIds.png.
"""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import Cityscapes as TorchvisionCityscapes

from dataset.source import RawItem, Source, class_rule, open_image, open_label
from utils.errors import UserError
from utils.labels import LabelSpace
from utils.options import DatasetOptions

FIRST_ID, LAST_ID = 7, 33
OFFICIAL = {kind.id: kind for kind in TorchvisionCityscapes.classes if FIRST_ID <= kind.id <= LAST_ID}


def labels(options: DatasetOptions) -> LabelSpace:
    """The official names and colours."""
    kinds = [OFFICIAL[label_id] for label_id in range(FIRST_ID, LAST_ID + 1)]
    return LabelSpace(tuple(kind.name for kind in kinds), tuple(kind.color for kind in kinds))


class Cityscapes(Source):
    """One split of Cityscapes.

    Args:
        options: `dataset.*`.
        split: "train" or "val".

    Raises:
        UserError: the folders are not there.
    """

    def __init__(self, options: DatasetOptions, split: str) -> None:
        root = Path(options.data_path)
        missing = [folder for folder in ("leftImg8bit", "gtFine") if not (root / folder / split).is_dir()]
        if missing:
            places = ", ".join(f"{folder}/{split}" for folder in missing)
            raise UserError(
                f"dataset.data_path is {root}: {places} is missing; the folder must hold leftImg8bit/ and "
                "gtFine/ as unpacked from leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"
            )
        self.images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        if split == "train" and not self.images:
            raise UserError(
                f"dataset.data_path is {root}: no <city>/*_leftImg8bit.png in leftImg8bit/{split}"
            )
        self.targets = [
            root / "gtFine" / split / path.parent.name / path.name.replace("_leftImg8bit", "_gtFine_labelIds")
            for path in self.images
        ]
        self.rule = class_rule({label_id: label_id - FIRST_ID for label_id in OFFICIAL})

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> RawItem:
        """The image and its official label ids."""
        image = open_image(self.images[index])
        return RawItem(image, open_label(self.targets[index], image.size))

    def label_path(self, index: int) -> Path:
        """The file of its label."""
        return self.targets[index]

    def name(self, index: int) -> str:
        """The image's file."""
        return str(self.images[index])
