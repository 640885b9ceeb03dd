"""Cityscapes (Cordts et al., CVPR 2016), fine annotations, 27 classes: official labelId - 7, others ignored.

Layout below data_path, as torchvision reads it: leftImg8bit/<split>/<city>/*_leftImg8bit.png and
gtFine/<split>/<city>/*_gtFine_labelIds.png.
"""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import Cityscapes as TorchvisionCityscapes

from dataset.base import INVALID, FileSource, class_rule, fetch_command, missing_data, not_there
from utils.config.options import DatasetOptions
from utils.vision.labels import IGNORE, LabelSpace

FIRST_ID, LAST_ID = 7, 33
IGNORED_IDS = (*range(FIRST_ID), 255)
OFFICIAL_SIZES = {"train": 2975, "val": 500}
HOLDS = (
    "leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_labelIds.png, as "
    "unpacked from leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"
)
OFFICIAL = {kind.id: kind for kind in TorchvisionCityscapes.classes if FIRST_ID <= kind.id <= LAST_ID}


def labels(options: DatasetOptions) -> LabelSpace:
    """The official names and colours."""
    kinds = [OFFICIAL[label_id] for label_id in range(FIRST_ID, LAST_ID + 1)]
    return LabelSpace(tuple(kind.name for kind in kinds), tuple(kind.color for kind in kinds))


class Cityscapes(FileSource):
    """One split of Cityscapes.

    Args:
        options: `dataset.*`.
        split: "train" or "val".

    Raises:
        UserError: the split holds no image, or, unless damaged files are to be left out, a label is not
            there.
    """

    def __init__(self, options: DatasetOptions, split: str) -> None:
        root = Path(options.data_path)
        prepare = f"say what to fetch, and unpack it: {fetch_command('cityscapes', root)}"
        images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        targets = [
            root / "gtFine" / split / path.parent.name / path.name.replace("_leftImg8bit", "_gtFine_labelIds")
            for path in images
        ]
        missing = (
            not_there(targets) if images else [root / "leftImg8bit" / split / "<city>/*_leftImg8bit.png"]
        )
        if missing and not (images and options.skip_damaged):
            raise missing_data(root, missing, holds=HOLDS, prepare=prepare)
        classes = {label_id: label_id - FIRST_ID for label_id in OFFICIAL}
        rule = class_rule(classes | dict.fromkeys(IGNORED_IDS, IGNORE), other=INVALID)
        super().__init__(images, targets, rule=rule)
        self.official = OFFICIAL_SIZES[split]
