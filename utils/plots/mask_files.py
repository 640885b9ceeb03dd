"""Mask files of photographs: ids with names and colours, result folders, masks and overlays."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.files import read_json_object, replacing, write_text
from utils.plots.report import render
from utils.vision.images import find_images
from utils.vision.labels import IGNORE, LabelSpace

MASK, OVERLAY, OVERLAYS = "mask.png", "overlay.jpg", "overlays"
MAX_OVERLAY_SIDE = 2048  # pixels; the mask keeps the full size
OPACITY = 0.5
CONTOUR = 255  # white; tinted segments never are
CONTOUR_EVERY = 600  # pixels of the shorter side per pixel of a contour's width

Colour = tuple[int, int, int]


def mask_ids(
    labels: LabelSpace, assignment: Sequence[int] | None, *, n_clusters: int
) -> tuple[list[str], list[Colour], list[int]]:
    """Ids of a mask: those of the classes, followed by the clusters without a class.

    `assignment` holds the class of each cluster, outside [0, n_classes) for none; None keeps the clusters'
    numbers. Returns name and (red, green, blue) of each id, and the id of each cluster.
    """
    spread = LabelSpace.with_spread_colours(tuple(map(str, range(IGNORE)))).palette
    palette = [*labels.palette, *spread[labels.n_classes :]][:n_clusters]
    if assignment is None:
        return [f"cluster {cluster}" for cluster in range(n_clusters)], palette, list(range(n_clusters))
    names, ids = list(labels.names), list(assignment)
    for cluster, class_id in enumerate(assignment):
        if class_id not in range(labels.n_classes):
            ids[cluster] = len(names)
            names.append(f"cluster {cluster}")
    return names, palette, ids


def renamed(names: Sequence[str], text: str) -> list[str]:
    """Applies --names to the names of the ids: "0=road,1=car", or a JSON file.

    Raises:
        UserError: an id does not exist, or its name is missing.
    """
    if text.endswith(".json"):
        new = read_json_object(Path(text))
    else:
        new = dict(map(str.strip, entry.partition("=")[::2]) for entry in text.split(","))
    known = [str(number) for number in range(len(names))]
    allowed = f'must be an id from 0 to {known[-1]} and a name, as in "0=road,1=car" or {{"0": "road"}}'
    mistakes = [
        f"--names: {k}={v}: {allowed}"
        for k, v in new.items()
        if k not in known or not v or not isinstance(v, str)
    ]
    if mistakes:
        raise UserError(mistakes)
    return [new.get(number, name) for number, name in zip(known, names, strict=True)]


class ResultFiles(NamedTuple):
    """The files of one photograph."""

    mask: Path
    overlay: Path


def result_files(images: Path, out: Path, *, flat: bool = False) -> dict[Path, ResultFiles]:
    """Maps each photograph to its files in `out`, named by its path below `images` without the ending.

    They are <name>/mask.png and <name>/overlay.jpg, or with `flat` <name>.png and overlays/<name>.jpg, where
    folders are joined by "_". Photographs that differ only in the ending keep it. A folder `out` below
    `images` is not searched.

    Raises:
        UserError: there is no image, `out` is `images`, or a mask would replace another file.
    """
    root = images.parent if images.is_file() else images.resolve()
    found = [images] if images.is_file() else _photographs(root, out.resolve())
    names = {file: file.relative_to(root) for file in found}
    if flat:
        names = {file: Path("_".join(name.parts)) for file, name in names.items()}
    count = Counter(map(_stem, names.values()))
    if flat:
        count["legend"] += 1  # legend.png is no mask
    files = {}
    for file, name in names.items():
        name = name.with_suffix("") if count[_stem(name)] == 1 else name
        mask, shown = (f"{name}.png", f"{OVERLAYS}/{name}.jpg") if flat else (name / MASK, name / OVERLAY)
        each = ResultFiles(out / mask, out / shown)
        if each.mask.exists() and not each.overlay.exists():  # an earlier result has both
            raise UserError(f"--out is {out}, but {each.mask} is no mask; choose another folder")
        files[file] = each
    if len(set(files.values())) < len(files):
        raise UserError(f"--images is {images}: two photographs would have the same mask; rename one")
    return files


def _stem(name: Path) -> str:
    """The name without its ending, as a file system that ignores case sees it."""
    return str(name.with_suffix("")).casefold()


def _photographs(images: Path, out: Path) -> list[Path]:
    if images == out:
        raise UserError(f"--out is {out}, the folder of the photographs; choose another")
    found, others = find_images(images, without=out)
    if not found:
        message = f"--images is {images}: it is missing or contains no image"
        raise UserError("; ".join(filter(None, (message, others))))
    if others:
        print(f"{images}: skipped {others}")
    return found


def write_results(
    files: ResultFiles, image: Image.Image, classes: np.ndarray, palette: Sequence[Colour]
) -> None:
    """Writes the mask, the ids (H, W) uint8 of an RGB image, and the overlay, the image in their colours."""
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    mask, small = Image.fromarray(classes), image.copy()
    small.thumbnail((MAX_OVERLAY_SIDE, MAX_OVERLAY_SIDE), Image.Resampling.BILINEAR)
    reduced = np.asarray(mask.resize(small.size, Image.Resampling.NEAREST))
    with replacing(files.overlay) as temporary:  # first, see `result_files`
        overlay(small, reduced, palette).save(temporary, format="JPEG", quality=90, subsampling=0)
    mask.putpalette(np.array(palette, dtype=np.uint8).tobytes())
    with replacing(files.mask) as temporary:
        mask.save(temporary, format="PNG")


def write_contact_sheet(
    out: Path, files: Iterable[ResultFiles], legend: Sequence[dict[str, Any]], skipped: Sequence[str]
) -> None:
    """Writes index.html: overlays linked to masks, the legend, and messages about skipped images."""
    pictures = []
    for each in files:
        mask, shown = (path.relative_to(out) for path in each)
        name = mask.parent if mask.name == MASK else mask.with_suffix("")
        links = (quote(os.fsencode(path.as_posix())) for path in (mask, shown))  # names may not be UTF-8
        pictures.append((str(name), *links))
    used = [row for row in legend if row["share"]]
    write_text(out / "index.html", render("masks.html", pictures=pictures, legend=used, skipped=skipped))


def overlay(image: Image.Image, classes: np.ndarray, palette: Sequence[Colour]) -> Image.Image:
    """The photograph (mode RGB) tinted by class (H, W), with white contours between segments."""
    colours = np.array(palette, dtype=np.float32)[classes]  # (H, W, 3)
    mixed = np.asarray(image) * (1 - OPACITY) + colours * OPACITY  # (H, W, 3)
    edges = np.zeros(classes.shape, dtype=bool)  # left of or above another segment
    for distance in range(1, 2 + min(classes.shape) // CONTOUR_EVERY):
        edges[:, :-distance] |= classes[:, :-distance] != classes[:, distance:]
        edges[:-distance] |= classes[:-distance] != classes[distance:]
    mixed[edges] = CONTOUR
    return Image.fromarray(mixed.round().astype(np.uint8))
