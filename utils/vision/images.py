"""Finding and reading image and label files: any common photograph becomes upright 8-bit RGB."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError, first_line

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
VIDEO_ENDINGS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".gif"}
SIXTEEN_BIT = 2**16


@contextmanager
def _reading(kind: str, name: str) -> Iterator[None]:
    """Converts any error of Pillow's decoders to a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: not a readable {kind} ({first_line(error)}); repair or remove it") from None


def open_image(path: Path) -> Image.Image:
    """An image file as 8-bit RGB, turned upright by its EXIF orientation; see `upright_rgb`.

    Raises:
        UserError: the file is missing, damaged, a video, or has neither 8 nor 16 bits.
    """
    if path.suffix.lower() in VIDEO_ENDINGS:
        raise UserError(f"{path}: is a video; {_frames_hint(path)}")
    with _reading("image", str(path)), Image.open(path) as image:
        return upright_rgb(image, str(path))


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image of any mode as upright 8-bit RGB; `name` is for errors.

    Transparency is dropped. Of 16-bit images the upper byte is used, as Pillow does with 16-bit colour.

    Raises:
        UserError: the image is damaged or has neither 8 nor 16 bits.
    """
    with _reading("image", name):
        upright = ImageOps.exif_transpose(image)
        if not upright.mode.startswith(("I", "F")):
            return upright.convert("RGB")
        values = np.asarray(upright)  # (H, W)
        if upright.mode == "F" or values.min() < 0 or values.max() >= SIXTEEN_BIT:
            raise UserError(
                f"{name}: image mode is {upright.mode}, must have 8 or 16 bits per channel; convert it"
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def open_label(path: Path, size: tuple[int, int]) -> Image.Image:
    """An 8-bit greyscale or palette image as class values in mode L; `size` is (W, H) of its image.

    Raises:
        UserError: the file is missing or damaged, or has another size or mode.
    """
    with _reading("label", str(path)), Image.open(path) as label:
        label.load()
    if label.mode not in ("L", "P"):
        raise UserError(f"{path}: label mode is {label.mode}, must be 8-bit greyscale or palette; convert it")
    if label.size != size:
        turned = label.size == size[::-1]
        hint = "; the image was rotated by its EXIF orientation: rotate the label too" if turned else ""
        raise UserError(
            f"{path}: label is {label.size} (width, height), its image is {size}; make them equal{hint}"
        )
    return label if label.mode == "L" else Image.frombytes("L", label.size, label.tobytes())


@dataclass(frozen=True)
class FoundImages:
    """Files in a folder and below, without hidden ones."""

    images: list[Path]  # sorted by path
    videos: list[Path]  # likewise
    others: dict[str, int]  # number of other files by ending

    def passed_over(self) -> str:
        """Describes the files that are not images; '' if there are none."""
        words = [f"{count} {ending or 'without ending'}" for ending, count in sorted(self.others.items())]
        parts = [f"other files: {', '.join(words)}"] if words else []
        if self.videos:
            number = f"{len(self.videos)} video{'s' if len(self.videos) > 1 else ''}"
            parts.append(f"{number}, such as {self.videos[0]}: {_frames_hint(self.videos[0])}")
        return "; ".join(parts)


def find_images(folder: Path, *, without: Path | None = None) -> FoundImages:
    """Finds images in a folder and below it, except in the folder `without`; follows links to folders."""
    images, videos, others, seen = [], [], Counter(), set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        # sorted, so that every machine follows the same one of two links to a folder
        folders[:] = sorted(n for n in folders if not n.startswith(".") and Path(place, n) != without)
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            ending = path.suffix.lower()
            if ending in IMAGE_ENDINGS:
                images.append(path)
            elif ending in VIDEO_ENDINGS:
                videos.append(path)
            else:
                others[ending] += 1
    return FoundImages(sorted(images), sorted(videos), dict(others))


def _frames_hint(video: Path) -> str:
    return f"extract frames, for example: ffmpeg -i {video.name} -vf fps=1 frame%06d.jpg"
