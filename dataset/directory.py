"""Any folder of photographs: imgs/{train,val}, and labels/{train,val} where there are labels.

Labels are 8-bit PNGs of class ids named as the images; 255, or what classes.json says, is ignored.
classes.json, optional: {"n_classes": 2, "classes": ["sky", "road"], "ignore": 255}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataset.source import INVALID, RawItem, Source, class_rule, open_image, open_label
from utils.errors import UserError
from utils.files import read_json_object
from utils.labels import IGNORE, LabelSpace
from utils.options import DatasetOptions

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
DEFAULT_IGNORE = 255
EXAMPLE = '{"n_classes": 2, "classes": ["sky", "road"], "ignore": 255}'


def _about(options: DatasetOptions) -> dict[str, Any]:
    """classes.json, checked: `n_classes`, `classes` and `ignore`, each where the file has it."""
    path = Path(options.data_path) / "classes.json"
    if not path.is_file():
        return {}
    about = read_json_object(path)
    count, names, ignore = (about.get(key) for key in ("n_classes", "classes", "ignore"))
    mistakes = []
    if count is not None and not (type(count) is int and 2 <= count <= 255):
        mistakes.append(f"n_classes is {count!r}, must be a whole number from 2 to 255")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        mistakes.append(f"classes is {names!r}, must be a list of names")
    if ignore is not None and not (type(ignore) is int and 0 <= ignore <= 255):
        mistakes.append(f"ignore is {ignore!r}, must be a whole number from 0 to 255")
    if mistakes:
        raise UserError(mistakes, f"{path} (such as {EXAMPLE})")
    return {key: value for key, value in about.items() if value is not None}


def labels(options: DatasetOptions) -> LabelSpace:
    """Classes from the options, else from classes.json.

    Raises:
        UserError: neither says how many, or names and number differ.
    """
    about = _about(options)
    names = options.class_names or about.get("classes")
    n_classes = options.n_classes or about.get("n_classes") or (len(names) if names else None)
    if n_classes is None:
        raise UserError(
            f"dataset.n_classes is null and {options.data_path}/classes.json does not say: set the number of "
            "classes to look for, as in dataset.n_classes=11"
        )
    names = names or [f"class {index}" for index in range(n_classes)]
    if len(names) != n_classes or len(set(names)) != len(names):
        raise UserError(
            f"dataset.n_classes is {n_classes}, but {len(names)} class names are given ({', '.join(names)}); "
            "give one unique name a class in dataset.class_names or classes.json"
        )
    return LabelSpace.with_spread_colours(tuple(names))


class Directory(Source):
    """One split of a folder of photographs.

    Args:
        options: `dataset.*`.
        split: "train" or "val"; without images in imgs/val the split is empty.

    Raises:
        UserError: there is no train image.
    """

    def __init__(self, options: DatasetOptions, split: str) -> None:
        root = Path(options.data_path)
        folder = root / "imgs" / split
        self.images = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_ENDINGS)
        if split == "train" and not self.images:
            endings = ", ".join(sorted(IMAGE_ENDINGS))
            raise UserError(
                f"dataset.data_path is {root}: {folder} holds no image ({endings}); put yours there"
            )
        self.targets = [root / "labels" / split / f"{path.stem}.png" for path in self.images]
        self.has_target = [path.is_file() for path in self.targets]
        self.labelled = any(self.has_target)
        ignore, n_classes = _about(options).get("ignore", DEFAULT_IGNORE), labels(options).n_classes
        if ignore < n_classes:
            raise UserError(
                f"{root / 'classes.json'}: ignore is {ignore}, must be none of the {n_classes} class ids"
            )
        classes = {class_id: class_id for class_id in range(n_classes)}
        self.rule = class_rule(classes | {ignore: IGNORE}, other=INVALID)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> RawItem:
        """The photograph and its label, if it has one."""
        image = open_image(self.images[index])
        return RawItem(image, open_label(self.targets[index], image.size) if self.has_target[index] else None)

    def label_path(self, index: int) -> Path:
        """The file of its label."""
        return self.targets[index]

    def name(self, index: int) -> str:
        """The photograph's file."""
        return str(self.images[index])
