"""COCO-Stuff (Caesar et al., CVPR 2018) with 27 coarse, 15 stuff or 3 classes.

Layout of data_path: curated/<split>/<list>.txt, images/<split>/<id>.jpg, annotations/<split>/<id>.png, with
split train2017 or val2017; annotations hold fine ids 0 to 181 and 255 = ignore.
"""

from pathlib import Path

from dataset.base import FileSource, class_rule, require_files
from utils.config.options import DatasetOptions
from utils.vision.labels import LabelSpace

NAMES = (
    *("electronic", "appliance", "food (thing)", "furniture (thing)", "indoor", "kitchen", "accessory"),
    *("animal", "outdoor", "person", "sports", "vehicle", "ceiling", "floor", "food (stuff)"),
    *("furniture (stuff)", "rawmaterial", "textile", "wall", "window", "building", "ground", "plant"),
    *("sky", "solid", "structural", "water"),
)
COARSE_OF_FINE = (
    *(9, 11, 11, 11, 11, 11, 11, 11, 11, 8, 8, 8, 8, 8, 8, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 6, 6, 6, 6, 6),
    *(6, 6, 6, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2),
    *(2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4),
    *(4, 17, 17, 22, 20, 20, 22, 15, 25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13, 13),
    *(13, 13, 13, 22, 26, 14, 14, 15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17, 25, 16, 21),
    *(17, 22, 16, 21, 21, 25, 21, 26, 21, 24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24, 15, 24, 22, 25, 15),
    *(20, 17, 17, 22, 14, 18, 18, 18, 18, 18, 18, 18, 26, 26, 19, 19, 24),
)
LISTS = {
    "cocostuff27": {"train": "Coco164kFull_Stuff_Coarse.txt", "val": "Coco164kFull_Stuff_Coarse_7.txt"},
    "cocostuff15": dict.fromkeys(("train", "val"), "Coco164kFull_Stuff_Coarse_7.txt"),
    "cocostuff3": dict.fromkeys(("train", "val"), "Coco164kFew_Stuff_6.txt"),
}
CLASSES = {"cocostuff27": NAMES, "cocostuff15": NAMES[12:], "cocostuff3": ("sky", "plant", "ground")}


def labels(options: DatasetOptions) -> LabelSpace:
    """The classes of the chosen variant."""
    return LabelSpace.with_spread_colours(CLASSES[options.data_type])


class CocoStuff(FileSource):
    """One split, "train" or "val"."""

    upright = False  # labels have the orientation of the stored pixels

    def __init__(self, options: DatasetOptions, split: str) -> None:
        root, folder = Path(options.data_path), f"{split}2017"
        listing = root / "curated" / folder / LISTS[options.data_type][split]
        require_files(options, [listing])
        ids = listing.read_text().split()
        images = [root / "images" / folder / f"{name}.jpg" for name in ids]
        targets = [root / "annotations" / folder / f"{name}.png" for name in ids]
        require_files(options, [*images, *targets], unless=options.skip_damaged)
        names = CLASSES[options.data_type]
        classes = {i: names.index(NAMES[c]) for i, c in enumerate(COARSE_OF_FINE) if NAMES[c] in names}
        ignored = (*range(len(COARSE_OF_FINE)), 255)  # ids of other classes, and pixels without a label
        super().__init__(images, targets, rule=class_rule(classes, ignored=ignored))
