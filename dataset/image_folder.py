"""Any folder of images: imgs/{train,val} and, optionally, labels/{train,val} and classes.json.

A folder without imgs/ is one train split of unlabelled images. Folders may be nested. Labels are 8-bit PNGs
of class ids with the path and name of their image; 255, or `ignore` in classes.json, is ignored.
classes.json: {"n_classes": 2, "classes": ["sky", "road"], "ignore": 255}, each key optional.
"""

from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from dataset.base import FileSource, class_rule
from dataset.crops import CROPS_FOLDER
from utils.config.options import DatasetOptions
from utils.errors import UserError
from utils.progress import print_once
from utils.vision.images import IMAGE_ENDINGS, find_images
from utils.vision.labels import LabelSpace

LABEL_FOLDERS = {"annotations", "gt", "label", "labels", "mask", "masks"}


class _ClassesFile(BaseModel, strict=True, extra="forbid"):
    n_classes: int | None = Field(None, ge=2, le=255)
    classes: list[str] | None = None
    ignore: int = Field(255, ge=0, le=255)


def _read_classes(options: DatasetOptions) -> _ClassesFile:
    path = Path(options.data_path) / "classes.json"
    try:
        return _ClassesFile.model_validate_json(path.read_bytes()) if path.is_file() else _ClassesFile()
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise UserError(lines, str(path)) from None


def labels(options: DatasetOptions) -> LabelSpace:
    """The classes that the options or else classes.json name."""
    stored = _read_classes(options)
    names = options.class_names or stored.classes or ()
    n_classes = options.n_classes or stored.n_classes or len(names)
    if not n_classes:
        raise UserError(
            f"dataset.n_classes is null and {options.data_path}/classes.json does not set it; give the "
            "number of classes to find, for example dataset.n_classes=11"
        )
    names = names or [f"class {index}" for index in range(n_classes)]
    if len(names) != n_classes or len(set(names)) != len(names):
        raise UserError(
            f"dataset.n_classes is {n_classes}, but there are {len(names)} class names ({', '.join(names)}); "
            "give one unique name per class in dataset.class_names or classes.json"
        )
    return LabelSpace.with_spread_colours(tuple(names))


class ImageFolder(FileSource):
    """One split, "train" or "val"; raises a UserError if there is no train image. "val" may be empty."""

    def __init__(self, options: DatasetOptions, split: str) -> None:
        root = Path(options.data_path)
        plain = split == "train" and not (root / "imgs").is_dir()
        folder = root if plain else root / "imgs" / split
        images, skipped = find_images(folder, without=root / CROPS_FOLDER)
        if skipped:
            print_once(f"{folder}: skipped {skipped}")
        folders = {part for image in images for part in image.relative_to(folder).parts[:-1]}
        for name in sorted(folders & LABEL_FOLDERS) if plain else ():
            hint = "if they are labels, move the photographs to imgs/train and the labels to labels/train"
            print_once(f"{root}: the images in {name} are used as training photographs; {hint}")
        if split == "train" and not images:
            endings = ", ".join(sorted(IMAGE_ENDINGS))
            message = f"{folder} holds no image ({endings}); put yours there"
            raise UserError(f"dataset.data_path is {root}: {message}")
        ignore, n_classes = _read_classes(options).ignore, labels(options).n_classes
        if ignore < n_classes:
            fix = f"a class id (0 to {n_classes - 1}); renumber the labels"
            raise UserError(f"{root}/classes.json: ignore is {ignore}, {fix}")
        rule = class_rule({class_id: class_id for class_id in range(n_classes)}, ignored=[ignore])
        super().__init__(images, _targets(images, folder, root / "labels" / split), rule=rule)


def _targets(images: list[Path], folder: Path, label_folder: Path) -> list[Path | None]:
    wanted = [label_folder / image.relative_to(folder).with_suffix(".png") for image in images]
    found, _ = find_images(label_folder)
    present = {path.with_suffix(".png"): path for path in found if path.suffix.lower() == ".png"}
    if images and label_folder.parent.is_dir() and not present:
        print_once(f"{label_folder}: holds no PNG file, so the images in {folder} have no labels")
    unused = sorted(present.keys() - set(wanted))
    if unused:
        message = f"{label_folder}: {len(unused)} of {len(present)} labels match no image, e.g. {unused[0]}"
        if images and len(unused) == len(present):
            raise UserError(f"{message}; a label has the path and name of its image, e.g. {wanted[0]}")
        print_once(message)
    return [present.get(path) for path in wanted]
