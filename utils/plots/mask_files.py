"""Mask files of photographs: ids with names and colours, result folders, masks and overlays."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from utils.errors import UserError
from utils.files import read_json_object, replacing
from utils.vision.images import find_images
from utils.vision.labels import IGNORE, LabelSpace

MASK, OVERLAY = "mask.png", "overlay.jpg"
MAX_OVERLAY_SIDE = 2048  # pixels; the mask keeps the full size
OPACITY = 0.5
CONTOUR = 255  # white; tinted segments never are
SPECK = 2000  # a segment smaller than 1 / SPECK of the image gets no contour, which would hide it
CONTOUR_EVERY = 600  # pixels of the shorter side per pixel of a contour's width

Colour = tuple[int, int, int]


def mask_ids(
    labels: LabelSpace, assignment: Sequence[int] | None, *, n_clusters: int
) -> tuple[list[str], list[Colour], list[int]]:
    """Ids of a mask: those of the classes, followed by the clusters without a class.

    Args:
        labels: the classes.
        assignment: class of each cluster, outside [0, n_classes) for none; None keeps the clusters' numbers.
        n_clusters: K.

    Returns:
        Name and (red, green, blue) of each id, and the id of each cluster.
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


def result_folders(images: Path, out: Path) -> dict[Path, Path]:
    """Maps each photograph to its result folder: its path below `images`, without the ending, in `out`.

    Photographs that differ only in the ending keep it. A folder `out` below `images` is not searched.

    Raises:
        UserError: there is no image, or `out` is `images`.
    """
    if images.is_file():
        return {images: out / images.stem}
    if not images.exists():
        raise UserError(f"--images is {images}: no such file or folder")
    if images.resolve() == out.resolve():
        raise UserError(f"--out is {out}, the folder of the photographs; choose another, or one below it")
    root = images.resolve()
    found, others = find_images(root, without=out.resolve())
    if not found:
        raise UserError(f"--images is {images}: it contains no image; {others}")
    if others:
        print(f"{images}: skipped {others}")
    files = [file.relative_to(root) for file in found]
    stems = [str(file.with_suffix("")).casefold() for file in files]  # some file systems ignore case
    count = Counter(stems)
    short = [
        file.with_suffix("") if count[stem] == 1 else file for file, stem in zip(files, stems, strict=True)
    ]
    return {images / file: out / name for file, name in zip(files, short, strict=True)}


def write_results(folder: Path, image: Image.Image, classes: np.ndarray, palette: Sequence[Colour]) -> None:
    """Writes mask.png, the ids (H, W) uint8 of an RGB image, and overlay.jpg, the image in their colours."""
    folder.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(classes)
    mask.putpalette(np.array(palette, dtype=np.uint8).tobytes())
    with replacing(folder / MASK) as temporary:
        mask.save(temporary, format="PNG")
    small = image.copy()
    small.thumbnail((MAX_OVERLAY_SIDE, MAX_OVERLAY_SIDE), Image.Resampling.BILINEAR)
    classes = np.asarray(Image.fromarray(classes).resize(small.size, Image.Resampling.NEAREST))
    with replacing(folder / OVERLAY) as temporary:
        overlay(small, classes, palette).save(temporary, format="JPEG", quality=90, subsampling=0)


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
