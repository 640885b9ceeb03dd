"""Cityscapes (Cordts et al., CVPR 2016), fine annotations, 27 classes: official labelId - 7, others ignored.

Layout of data_path, as in torchvision: leftImg8bit/<split>/<city>/*_leftImg8bit.png and
gtFine/<split>/<city>/*_gtFine_labelIds.png.
"""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import Cityscapes as TorchvisionCityscapes

from dataset.base import FileSource, class_rule, missing_data, require_files
from utils.config.options import DatasetOptions
from utils.vision.labels import LabelSpace

FIRST_ID, LAST_ID = 7, 33
IGNORED_IDS = (*range(FIRST_ID), 255)
OFFICIAL_SIZES = {"train": 2975, "val": 500}
OFFICIAL = {kind.id: kind for kind in TorchvisionCityscapes.classes if FIRST_ID <= kind.id <= LAST_ID}


def labels(options: DatasetOptions) -> LabelSpace:
    """The official names and colours."""
    kinds = [OFFICIAL[label_id] for label_id in range(FIRST_ID, LAST_ID + 1)]
    return LabelSpace(tuple(kind.name for kind in kinds), tuple(kind.color for kind in kinds))


class Cityscapes(FileSource):
    """One split, "train" or "val"; raises a UserError if it has no image or a label is missing."""

    def __init__(self, options: DatasetOptions, split: str) -> None:
        folder, label_folder = (Path(options.data_path, name, split) for name in ("leftImg8bit", "gtFine"))
        images = sorted(folder.glob("*/*_leftImg8bit.png"))
        if not images:
            raise missing_data(options, [folder / "<city>/*_leftImg8bit.png"])
        targets = [
            label_folder / path.parent.name / path.name.replace("_leftImg8bit", "_gtFine_labelIds")
            for path in images
        ]
        require_files(options, targets)
        classes = {label_id: label_id - FIRST_ID for label_id in OFFICIAL}
        super().__init__(images, targets, rule=class_rule(classes, ignored=IGNORED_IDS))
        self.official_size = OFFICIAL_SIZES[split]
