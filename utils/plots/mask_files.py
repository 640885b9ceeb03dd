"""Mask files of photographs: ids with names and colours, result folders, masks and overlays."""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from utils.errors import UserError
from utils.files import read_json_object, replacing, write_text
from utils.plots.report import render
from utils.vision.images import find_images
from utils.vision.labels import IGNORE, LabelSpace

MASK, OVERLAY, OVERLAYS = "mask.png", "overlay.jpg", "overlays"
MAX_OVERLAY_SIDE = 2048  # pixels; the mask keeps the full size
ORIGIN = "Origin"  # text in a mask's file that identifies photograph and network
OPACITY = 0.5
LONGEST = 230  # bytes of a file name without numbers and endings
CONTOUR = 255  # white; tinted segments never are
SPECK = 2000  # a segment smaller than 1 / SPECK of the image gets no contour, which would hide it
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
    unused = [colour for colour in spread[labels.n_classes :] if colour not in labels.palette]
    palette = [*labels.palette, *unused, *spread][:n_clusters]
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
    mistakes = [f"--names: {k}={v}: {allowed}" for k, v in new.items() if k not in known or not v]
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
    folders are joined by "_". Photographs that differ only in the ending keep it; names that are still taken
    are numbered. A folder `out` below `images` is not searched.

    Raises:
        UserError: there is no image, `out` is `images`, or a mask would replace another file.
    """
    if images.is_file():
        names = {images: Path(images.name)}
    else:
        names = {images / name: name for name in _photographs_below(images, without=out)}
    if flat:
        names = {file: _flat(name) for file, name in names.items()}
    count = Counter(str(name.with_suffix("")).casefold() for name in names.values())  # as some file systems
    files, taken = {}, {"legend"} if flat else set()  # legend.png is no mask
    for file, name in names.items():
        stem = name.with_suffix("")
        plain = name = stem if count[str(stem).casefold()] == 1 else name
        for number in itertools.count(2):
            if str(name).casefold() not in taken:
                break
            name = plain.with_name(f"{plain.name}-{number}")
        taken.add(str(name).casefold())
        mask, shown = (f"{name}.png", f"{OVERLAYS}/{name}.jpg") if flat else (name / MASK, name / OVERLAY)
        files[file] = ResultFiles(out / mask, out / shown)
        if files[file].mask.exists() and not files[file].overlay.exists():  # an earlier result has both
            raise UserError(f"--out is {out}, but {files[file].mask} is no mask; choose another folder")
    return files


def _flat(name: Path) -> Path:
    """The parts of a path joined by "_"; of a name that is too long for a file, its end."""
    stem = os.fsencode("_".join(name.with_suffix("").parts))
    stem = stem if len(stem) <= LONGEST else stem[-LONGEST:].decode(errors="ignore").encode()
    return Path(os.fsdecode(stem) + name.suffix)


def _photographs_below(images: Path, *, without: Path) -> list[Path]:
    if not images.exists():
        raise UserError(f"--images is {images}: no such file or folder")
    root = images.resolve()
    if root == without.resolve():
        raise UserError(f"--out is {without}, the folder of the photographs; choose another")
    found, others = find_images(root, without=without.resolve())
    if not found:
        raise UserError(f"--images is {images}: it contains no image; {others}")
    if others:
        print(f"{images}: skipped {others}")
    return [file.relative_to(root) for file in found]


def origin_of(photograph: Path, maker: str) -> str:
    """SHA-256 of what made a mask and of the photograph's name, size and time, '' if it is unreadable."""
    try:
        status = photograph.stat()
    except OSError:
        return ""
    origin = maker, photograph.name, status.st_size, status.st_mtime_ns
    return hashlib.sha256(repr(origin).encode()).hexdigest()


def kept_mask(files: ResultFiles, origin: str) -> np.ndarray | None:
    """The mask (H, W) uint8 that was written with the same origin, if its overlay exists too."""
    try:
        with Image.open(files.mask, formats=["PNG"]) as mask:
            same = origin and mask.info.get(ORIGIN) == origin and files.overlay.exists()
            return np.asarray(mask) if same else None
    except (OSError, SyntaxError, ValueError):  # missing or damaged
        return None


def write_results(
    files: ResultFiles,
    image: Image.Image,
    classes: np.ndarray,
    palette: Sequence[Colour],
    *,
    origin: str = "",
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
    text = PngInfo()
    text.add_text(ORIGIN, origin)
    with replacing(files.mask) as temporary:
        mask.save(temporary, format="PNG", pnginfo=text)


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
    mixed[_contours(classes)] = CONTOUR
    return Image.fromarray(mixed.round().astype(np.uint8))


def _contours(classes: np.ndarray) -> np.ndarray:
    """Pixels (H, W) bool left of or above another segment, wider on large images; none around specks."""
    edges, specks = np.zeros((2, *classes.shape), dtype=bool)
    width = 1 + min(classes.shape) // CONTOUR_EVERY
    for distance in range(1, 1 + width):
        edges[:, :-distance] |= classes[:, :-distance] != classes[:, distance:]
        edges[:-distance] |= classes[:-distance] != classes[distance:]
    for class_id in np.unique(classes):
        segments, _ = ndimage.label(classes == class_id)  # (H, W), 0 is another class
        small = np.bincount(segments.ravel()) * SPECK < classes.size
        small[0] = False
        specks |= small[segments]
    return edges & ~ndimage.binary_dilation(specks, iterations=width)
