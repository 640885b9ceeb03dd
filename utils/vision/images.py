"""Reading image and label files: any common kind of photograph, as 8-bit RGB and upright."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError, first_line

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
VIDEO_ENDINGS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".gif"}
SIXTEEN_BIT = 2**16


def open_image(path: Path) -> Image.Image:
    """An image file as 8-bit RGB, turned upright as its EXIF orientation says.

    Greyscale, palette, CMYK and transparent images are converted (transparency is dropped); of 16-bit ones
    the upper byte is taken, as Pillow does with 16-bit colour.

    Raises:
        UserError: the file is missing, damaged, a video, or has other than 8 or 16 bits; names it.
    """
    if path.suffix.lower() in VIDEO_ENDINGS:
        raise UserError(f"{path}: is a video; {frames_hint(path)}")
    try:
        with Image.open(path) as image:
            return upright_rgb(image, str(path))
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise what they like
        raise UserError(f"{path}: not a readable image ({first_line(error)}); mend or remove it") from None


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """An opened image as `open_image` gives it.

    Args:
        image: of any mode and size.
        name: what to call it in an error.

    Raises:
        UserError: damaged, or it has other than 8 or 16 bits.
    """
    try:
        upright = ImageOps.exif_transpose(image)
        if not image.mode.startswith(("I", "F")):
            return upright.convert("RGB")
    except Exception as error:  # Pillow's decoders raise what they like
        raise UserError(f"{name}: not a readable image ({first_line(error)}); mend or remove it") from None
    values = np.asarray(upright)  # (H, W), of 16, 32 or floating bits
    if upright.mode == "F" or values.min() < 0 or values.max() >= SIXTEEN_BIT:
        raise UserError(f"{name}: image mode is {upright.mode}, must have 8 or 16 bits a channel; convert it")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def open_label(path: Path, size: tuple[int, int]) -> Image.Image:
    """A label file as 8-bit class values.

    Args:
        path: an 8-bit greyscale or palette image.
        size: (W, H) of its image.

    Raises:
        UserError: missing, damaged, of another size or mode.
    """
    try:
        with Image.open(path) as label:
            label.load()
    except Exception as error:  # Pillow's decoders raise what they like
        raise UserError(f"{path}: not a readable label ({first_line(error)}); mend or remove it") from None
    if label.mode not in ("L", "P"):
        raise UserError(
            f"{path}: label mode is {label.mode}, must be 8-bit greyscale or palette, one id a pixel"
        )
    if label.size != size:
        turned = label.size == size[::-1]
        why = "; the image was turned upright as its EXIF orientation says: turn the label" if turned else ""
        raise UserError(
            f"{path}: label is {label.size} (width, height), its image is {size}; make them equal{why}"
        )
    return label if label.mode == "L" else Image.frombytes("L", label.size, label.tobytes())


@dataclass(frozen=True)
class FoundImages:
    """What a folder holds.

    Attributes:
        images: image files in it and below it, sorted by their path.
        videos: likewise.
        others: ending -> number of further files, hidden ones aside.
    """

    images: list[Path]
    videos: list[Path]
    others: dict[str, int]

    def passed_over(self) -> str:
        """What was found besides images, in words; '' where there is nothing."""
        words = [f"{count} {ending or 'without ending'}" for ending, count in sorted(self.others.items())]
        parts = [f"other files: {', '.join(words)}"] if words else []
        if self.videos:
            number = f"{len(self.videos)} video{'s' if len(self.videos) > 1 else ''}"
            parts.append(f"{number}, such as {self.videos[0]}: {frames_hint(self.videos[0])}")
        return "; ".join(parts)


def find_images(folder: Path, *, without: Path | None = None) -> FoundImages:
    """All images in a folder and the folders below it; links to folders are followed, hidden names not.

    Args:
        folder: where to look.
        without: a folder below it that is left out.
    """
    images, videos, others, seen = [], [], Counter(), set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        # in order, so that of two links to one folder every machine follows the same
        folders[:] = sorted(n for n in folders if not n.startswith(".") and Path(place, n) != without)
        for name in files:
            path = Path(place, name)
            ending = path.suffix.lower()
            if name.startswith("."):
                continue
            if ending in IMAGE_ENDINGS:
                images.append(path)
            elif ending in VIDEO_ENDINGS:
                videos.append(path)
            else:
                others[ending] += 1
    return FoundImages(sorted(images), sorted(videos), dict(others))


def frames_hint(video: Path) -> str:
    """How to make images of a video."""
    return f"take frames out of it, as in: ffmpeg -i {video.name} -vf fps=1 frame%06d.jpg"
