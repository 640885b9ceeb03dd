"""Cityscapes (Cordts et al., CVPR 2016), fine annotations, 27 classes: official labelId - 7, others ignored.

Layout of data_path, as in torchvision: leftImg8bit/<split>/<city>/*_leftImg8bit.png and
gtFine/<split>/<city>/*_gtFine_labelIds.png.
"""

from pathlib import Path

from torchvision.datasets import Cityscapes as TorchvisionCityscapes

from dataset.base import FileSource, class_rule, require_files
from utils.config.options import DatasetOptions
from utils.vision.labels import LabelSpace

OFFICIAL = {kind.id: kind for kind in TorchvisionCityscapes.classes if 7 <= kind.id <= 33}


def labels(options: DatasetOptions) -> LabelSpace:
    """The official names and colours."""
    kinds = OFFICIAL.values()  # in the order of their ids
    return LabelSpace(tuple(kind.name for kind in kinds), tuple(kind.color for kind in kinds))


class Cityscapes(FileSource):
    """One split, "train" or "val"."""

    def __init__(self, options: DatasetOptions, split: str) -> None:
        folder, label_folder = (Path(options.data_path, name, split) for name in ("leftImg8bit", "gtFine"))
        images = sorted(folder.glob("*/[!.]*_leftImg8bit.png"))
        require_files(options, images or [folder / "<city>/*_leftImg8bit.png"])
        names = [path.name.replace("_leftImg8bit", "_gtFine_labelIds") for path in images]
        targets = [label_folder / path.parent.name / name for path, name in zip(images, names, strict=True)]
        require_files(options, targets, unless=options.skip_damaged)
        rule = class_rule({label_id: label_id - 7 for label_id in OFFICIAL}, ignored=(*range(7), 255))
        super().__init__(images, targets, rule=rule)
