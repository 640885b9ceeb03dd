"""Any folder of photographs: imgs/{train,val}, and labels/{train,val} where there are labels.

A folder without imgs/ is taken as photographs to train on, all of it. Folders may be nested. Labels are 8-bit
PNGs of class ids, placed and named as the images; 255, or what classes.json says, is ignored.
classes.json, optional: {"n_classes": 2, "classes": ["sky", "road"], "ignore": 255}.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dataset.base import INVALID, FileSource, class_rule
from dataset.crops import CROPS_FOLDER
from utils.config.options import DatasetOptions
from utils.errors import UserError
from utils.files import read_json_object
from utils.vision.images import IMAGE_ENDINGS, find_images
from utils.vision.labels import IGNORE, LabelSpace

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


class Directory(FileSource):
    """One split of a folder of photographs.

    Args:
        options: `dataset.*`.
        split: "train" or "val"; without images in imgs/val the split is empty.

    Raises:
        UserError: there is no train image, or labels that are there fit no image, or more than one.
    """

    def __init__(self, options: DatasetOptions, split: str) -> None:
        root = Path(options.data_path)
        plain = not (root / "imgs").is_dir()
        folder = root if plain else root / "imgs" / split
        without = root / CROPS_FOLDER  # which lies among the photographs of a plain folder
        found = find_images(folder, without=without) if split == "train" or not plain else None
        images = found.images if found else []
        passed_over = found.passed_over() if found else ""
        if split == "train" and not images:
            endings = ", ".join(sorted(IMAGE_ENDINGS))
            raise UserError(
                f"dataset.data_path is {root}: {folder} holds no image ({endings}); put yours there"
                + (f"; {passed_over}" if passed_over else "")
            )
        if plain and split == "train":
            print(f"{root} has no folder imgs: trains on all {len(images)} images in it, without labels")
        if passed_over:
            print(f"{folder}: left out: {passed_over}")
        targets = [None] * len(images) if plain else _targets(images, folder, root / "labels" / split)
        ignore, n_classes = _about(options).get("ignore", DEFAULT_IGNORE), labels(options).n_classes
        if ignore < n_classes:
            raise UserError(
                f"{root / 'classes.json'}: ignore is {ignore}, must be none of the {n_classes} class ids"
            )
        classes = {class_id: class_id for class_id in range(n_classes)}
        super().__init__(images, targets, rule=class_rule(classes | {ignore: IGNORE}, other=INVALID))


def _targets(images: list[Path], folder: Path, below: Path) -> list[Path | None]:
    """The label of each image, or None where there is none.

    Raises:
        UserError: there are labels, but none belongs to an image, or one belongs to several.
    """
    wanted = [below / image.relative_to(folder).with_suffix(".png") for image in images]
    there = {path for path in below.rglob("*.png") if not path.name.startswith(".")}
    shared = [path for path, count in Counter(wanted).items() if count > 1 and path in there]
    if shared:
        several = [str(image) for image, path in zip(images, wanted, strict=True) if path == shared[0]]
        raise UserError(f"{shared[0]}: belongs to {' and '.join(several)}; rename one image and its label")
    unused = sorted(there - set(wanted))
    if unused:
        told = f"{below}: {len(unused)} of {len(there)} labels belong to no image, such as {unused[0]}"
        if images and len(unused) == len(there):
            raise UserError(f"{told}; a label is placed and named as its image, as in {wanted[0]}")
        print(told)
    return [path if path in there else None for path in wanted]
