"""Masks and overlays as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from utils.errors import UserError, first_line
from utils.files import replacing
from utils.plots.mask_ids import MaskIds

LONGEST_OVERLAY = 2048  # pixels: to look at, where the mask has every pixel
OPACITY = 0.5
LINE = 255  # white: the one colour that no segment is tinted with
SPECK = 2000
LINE_EVERY = 600  # pixels of the shorter side for each further pixel of a line's width


def write_mask(path: Path, classes: np.ndarray, ids: MaskIds) -> None:
    """An 8-bit PNG of ids with their colours as its palette.

    Args:
        path: to write.
        classes: (H, W) uint8.
        ids: names and colours.

    Raises:
        UserError: it cannot be written.
    """
    mask = Image.fromarray(classes)
    mask.putpalette(np.array(ids.palette, dtype=np.uint8).tobytes())
    _write(path, mask, format="PNG")


def write_overlay(path: Path, image: Image.Image, classes: np.ndarray, *, ids: MaskIds) -> None:
    """A JPEG of the photograph tinted by class, at 2,048 pixels on the longer side at most.

    Args:
        path: to write.
        image: mode RGB.
        classes: (H, W) uint8, at the image's size.
        ids: names and colours.

    Raises:
        UserError: it cannot be written.
    """
    scale = min(1, LONGEST_OVERLAY / max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
        classes = np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))
    _write(path, overlay(image, classes, ids=ids), format="JPEG", quality=90, subsampling=0)


def overlay(image: Image.Image, classes: np.ndarray, *, ids: MaskIds) -> Image.Image:
    """The photograph tinted by class, with a white line between segments.

    Args:
        image: mode RGB.
        classes: (H, W) uint8.
        ids: colours.
    """
    colours = np.array(ids.palette, dtype=np.float32)[classes]  # (H, W, 3)
    mixed = np.asarray(image) * (1 - OPACITY) + colours * OPACITY  # (H, W, 3)
    mixed[contours(classes)] = LINE
    return Image.fromarray(mixed.round().astype(np.uint8))


def contours(classes: np.ndarray) -> np.ndarray:
    """Lines between segments, wider on large pictures; around specks there is none, which would hide them.

    Args:
        classes: (H, W) uint8.

    Returns:
        (H, W) bool: pixels before another segment begins, to the right or below.
    """
    found = np.zeros(classes.shape, dtype=bool)
    width = 1 + min(classes.shape) // LINE_EVERY
    for distance in range(1, 1 + width):
        found[:, :-distance] |= classes[:, :-distance] != classes[:, distance:]
        found[:-distance] |= classes[:-distance] != classes[distance:]
    return found & ~ndimage.binary_dilation(specks(classes), iterations=width)


def specks(classes: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of connected parts of a class that are less than 1 / `SPECK` of the picture."""
    found = np.zeros(classes.shape, dtype=bool)
    for class_id in np.unique(classes):
        parts, _ = ndimage.label(classes == class_id)  # (H, W), 0 is another class
        small = np.bincount(parts.ravel()) * SPECK < classes.size
        small[0] = False
        found |= small[parts]
    return found


def _write(path: Path, picture: Image.Image, **how: object) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            picture.save(temporary, **how)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}); choose another --out") from None
