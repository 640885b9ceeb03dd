"""Mask files of photographs: ids with names and colours, result folders, masks and overlays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from utils.errors import UserError
from utils.files import read_json_object, replacing
from utils.vision.images import IMAGE_ENDINGS, find_images
from utils.vision.labels import LabelSpace

MASK, OVERLAY, LEGEND, LEGEND_DATA = "mask.png", "overlay.jpg", "legend.png", "legend.json"
MAX_IDS = 256  # of an 8-bit mask
MAX_OVERLAY_SIDE = 2048  # pixels; the mask keeps the full size
OPACITY = 0.5
CONTOUR = 255  # white, which no tinted segment is
SPECK = 2000  # a segment smaller than 1 / SPECK of the image gets no contour, which would hide it
CONTOUR_EVERY = 600  # pixels of the shorter side per pixel of a contour's width
NAMES_EXAMPLE = '"0=road,1=car", or a JSON file such as {"0": "road", "1": "car"}'

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class MaskIds:
    """The ids of a mask, from 0.

    Attributes:
        names: one per id; two ids may have the same name.
        palette: one (red, green, blue) per id, 0 to 255.
        of_prediction: id of each predicted class or cluster.
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    of_prediction: tuple[int, ...]

    def renamed(self, names: dict[int, str]) -> MaskIds:
        """The same ids with some names replaced.

        Raises:
            UserError: an id does not exist.
        """
        last = len(self.names) - 1
        if unknown := [f"{number}={name}" for number, name in names.items() if number > last]:
            raise UserError([f"--names: {entry}: ids are 0 to {last}" for entry in unknown])
        return replace(self, names=tuple(names.get(number, name) for number, name in enumerate(self.names)))

    def legend(self, counts: np.ndarray) -> list[dict[str, Any]]:
        """`id`, `name`, `colour` and `share` in percent of each id, given its number of pixels."""
        shares = (100 * counts / max(1, counts.sum())).tolist()
        rows = zip(self.names, self.palette, shares, strict=True)
        return [
            {"id": number, "name": name, "colour": list(colour), "share": share}
            for number, (name, colour, share) in enumerate(rows)
        ]


def class_ids(labels: LabelSpace) -> MaskIds:
    """Ids of a head that predicts classes: those of the data set."""
    return MaskIds(labels.names, labels.palette, tuple(range(labels.n_classes)))


def cluster_ids(labels: LabelSpace, n_clusters: int, *, assignment: Sequence[int] | None) -> MaskIds:
    """Ids of clusters.

    A cluster that was matched to a class has the id, name and colour of that class; ids of the other clusters
    follow the classes. Without a matching, an id is the number of its cluster.

    Args:
        labels: the classes.
        n_clusters: K.
        assignment: class of each cluster, outside [0, n_classes) for none; None without a matching.

    Raises:
        UserError: there are more ids than an 8-bit mask can hold.
    """
    if n_clusters > MAX_IDS:
        raise UserError(f"there are {n_clusters} clusters; an 8-bit mask can hold at most {MAX_IDS} ids")
    palette = extended_palette(labels.palette, n_clusters)
    if assignment is None:
        names = tuple(f"cluster {cluster}" for cluster in range(n_clusters))
        return MaskIds(names, palette, tuple(range(n_clusters)))
    classes = range(labels.n_classes)
    extra = [cluster for cluster, class_id in enumerate(assignment) if class_id not in classes]
    extra_ids = {cluster: labels.n_classes + place for place, cluster in enumerate(extra)}
    ids = tuple(extra_ids.get(cluster, class_id) for cluster, class_id in enumerate(assignment))
    return MaskIds((*labels.names, *(f"cluster {cluster}" for cluster in extra)), palette, ids)


def extended_palette(palette: Sequence[Colour], count: int) -> tuple[Colour, ...]:
    """The first `count` colours of a palette, extended by other colours if it has fewer."""
    spread = LabelSpace.with_spread_colours(tuple(map(str, range(MAX_IDS - 1)))).palette
    unused = [colour for colour in spread[len(palette) :] if colour not in palette]
    return (*palette, *unused, *spread)[:count]


def read_names(text: str | None) -> dict[int, str]:
    """Names by id from --names: "0=road,1=car", a JSON file, or None.

    Raises:
        UserError: the text is neither, or an id is no whole number or is repeated.
    """
    if text is None:
        return {}
    if text.endswith(".json"):
        pairs = list(read_json_object(Path(text)).items())
    else:
        entries = [entry.partition("=") for entry in text.split(",")]
        pairs = [(number.strip(), name.strip()) for number, _, name in entries]
    mistakes, names = [], {}
    for number, name in pairs:
        if not re.fullmatch(r"[0-9]{1,3}", number) or not isinstance(name, str) or not name:
            mistakes.append(f"--names: {number}: must be an id and a name, as in {NAMES_EXAMPLE}")
        elif int(number) in names:
            mistakes.append(f"--names: id {int(number)} is given twice; keep one")
        else:
            names[int(number)] = name
    if mistakes:
        raise UserError(mistakes)
    return names


def result_folders(images: Path, out: Path) -> dict[Path, Path]:
    """Maps each photograph to the folder of its results below `out`.

    The folder is the path of the photograph below `images` without its ending; if two photographs would share
    a folder, both keep their ending. If `out` lies below `images`, it is not searched.

    Raises:
        UserError: there is no image, or a result would overwrite a photograph.
    """
    if not images.exists():
        raise UserError(f"--images is {images}: no such file or folder")
    root = images if images.is_dir() else images.parent
    files = _images_below(images, out) if images.is_dir() else [images]
    names = _distinct_names([file.relative_to(root) for file in files])
    folders = {file: out / name for file, name in zip(files, names, strict=True)}
    sources = {file.resolve() for file in files}
    for result in (folder / name for folder in folders.values() for name in (MASK, OVERLAY)):
        if result.resolve() in sources:
            raise UserError(f"--out is {out}: {result} is a photograph; choose another --out")
    return folders


def _images_below(folder: Path, out: Path) -> list[Path]:
    if out.resolve() == folder.resolve():
        raise UserError(f"--out is {out}, the folder of the photographs; choose another, or one below it")
    below = out.resolve().is_relative_to(folder.resolve())
    without = folder / out.resolve().relative_to(folder.resolve()) if below else None
    images, others = find_images(folder, without=without)
    if not images:
        nothing = f"no image ({', '.join(sorted(IMAGE_ENDINGS))})"
        raise UserError(f"--images is {folder}: it contains {'; '.join(filter(None, (nothing, others)))}")
    if others:
        print(f"{folder}: skipped {others}")
    return images


def _distinct_names(files: list[Path]) -> list[Path]:
    """Names without endings where they stay distinct, also on file systems that ignore case."""
    names = [file.with_suffix("") for file in files]
    while True:
        count = Counter(str(name).casefold() for name in names)
        longer = [
            file if count[str(name).casefold()] > 1 else name for file, name in zip(files, names, strict=True)
        ]
        if longer == names:
            return names
        names = longer


def write_mask(path: Path, classes: np.ndarray, ids: MaskIds) -> None:
    """Writes ids (H, W) uint8 as an 8-bit PNG that has their colours as its palette."""
    mask = Image.fromarray(classes)
    mask.putpalette(np.array(ids.palette, dtype=np.uint8).tobytes())
    with replacing(path) as temporary:
        mask.save(temporary, format="PNG")


def write_overlay(path: Path, image: Image.Image, classes: np.ndarray, *, ids: MaskIds) -> None:
    """Writes the photograph tinted by class as a JPEG, reduced to at most 2,048 pixels on its longer side.

    Args:
        path: to write.
        image: mode RGB.
        classes: (H, W) uint8, the size of the image.
        ids: colours.
    """
    scale = min(1, MAX_OVERLAY_SIDE / max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
        classes = np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))
    with replacing(path) as temporary:
        overlay(image, classes, ids=ids).save(temporary, format="JPEG", quality=90, subsampling=0)


def overlay(image: Image.Image, classes: np.ndarray, *, ids: MaskIds) -> Image.Image:
    """The photograph (mode RGB) tinted by class (H, W), with white contours between segments."""
    colours = np.array(ids.palette, dtype=np.float32)[classes]  # (H, W, 3)
    mixed = np.asarray(image) * (1 - OPACITY) + colours * OPACITY  # (H, W, 3)
    mixed[contours(classes)] = CONTOUR
    return Image.fromarray(mixed.round().astype(np.uint8))


def contours(classes: np.ndarray) -> np.ndarray:
    """Pixels (H, W) bool left of or above another segment, wider on large images; none around specks."""
    found = np.zeros(classes.shape, dtype=bool)
    width = 1 + min(classes.shape) // CONTOUR_EVERY
    for distance in range(1, 1 + width):
        found[:, :-distance] |= classes[:, :-distance] != classes[:, distance:]
        found[:-distance] |= classes[:-distance] != classes[distance:]
    return found & ~ndimage.binary_dilation(_specks(classes), iterations=width)


def _specks(classes: np.ndarray) -> np.ndarray:
    """Pixels (H, W) bool of connected segments smaller than 1 / SPECK of the image."""
    found = np.zeros(classes.shape, dtype=bool)
    for class_id in np.unique(classes):
        segments, _ = ndimage.label(classes == class_id)  # (H, W), 0 is another class
        small = np.bincount(segments.ravel()) * SPECK < classes.size
        small[0] = False
        found |= small[segments]
    return found
