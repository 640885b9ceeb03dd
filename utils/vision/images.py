"""Finding and reading image and label files: any common photograph becomes upright 8-bit RGB."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError, first_line

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
VIDEO_ENDINGS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".gif"}
VIDEO_HINT = "extract the frames of a video, for example: ffmpeg -i <video> -vf fps=1 frame%06d.jpg"
Image.MAX_IMAGE_PIXELS = 2**29  # Pillow warns above it, and refuses twice as many
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")  # Pillow runs Ghostscript for others


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        raise UserError(f"{path}: not a readable {kind} ({first_line(error)}); repair or remove it") from None


def open_image(path: Path, *, upright: bool = True) -> Image.Image:
    """An image file as 8-bit RGB, by default turned upright as its EXIF orientation says.

    Raises:
        UserError: it is missing, damaged or unsupported.
    """
    if path.suffix.lower() in VIDEO_ENDINGS:
        raise UserError(f"{path}: is a video; {VIDEO_HINT}")
    with _opened(path, "image") as image:
        return as_rgb(image, str(path), upright=upright)


def as_rgb(image: Image.Image, name: str, *, upright: bool = True) -> Image.Image:
    """An image of any mode as 8-bit RGB, by default turned by its EXIF orientation; `name` is for errors.

    Transparency and metadata are dropped. Of 16-bit images the upper byte is used, as Pillow does with
    16-bit colour.
    """
    if upright:
        image = _turned(image)
    if not image.mode.startswith(("I", "F")):
        return Image.fromarray(np.asarray(image.convert("RGB")))
    values = np.asarray(image)  # (H, W)
    if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
        raise UserError(f"{name}: image mode is {image.mode}, must have 8 or 16 bits; convert it")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _turned(image: Image.Image) -> Image.Image:
    image.getexif()  # Pillow keeps it
    exif = image.info.pop("exif", None)  # a malformed one could not be written again
    try:
        return ImageOps.exif_transpose(image)
    finally:
        image.info |= {} if exif is None else {"exif": exif}


def open_label(path: Path, size: tuple[int, int]) -> Image.Image:
    """An 8-bit greyscale or palette image as class values in mode L; `size` is (W, H) of its image."""
    with _opened(path, "label") as label:
        label.load()
    if label.mode not in ("L", "P"):
        raise UserError(f"{path}: label mode is {label.mode}, must be 8-bit greyscale or palette; convert it")
    if label.size != size:
        raise UserError(
            f"{path}: label is {label.size} (width, height), its image is {size}; make them equal (the EXIF "
            "orientation turns an image, but not its label)"
        )
    return label if label.mode == "L" else Image.frombytes("L", label.size, label.tobytes())


def find_images(folder: Path, *, without: Path | None = None) -> tuple[list[Path], str]:
    """Images in a folder and below it, sorted, and a description of the other files ('' if there are none).

    Follows links; skips hidden files, hidden folders and the folder `without`.
    """
    images, others, seen = [], Counter(), set()
    for place, folders, files in os.walk(folder, followlinks=True):
        masks = Path(place) != folder and {"index.html", "legend.json"}.issubset(files)  # of eval.py --images
        if masks:
            others["folder of masks"] += 1
        if masks or (real := os.path.realpath(place)) in seen:  # or a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        # sorted, so that of two links to one folder every machine follows the same
        folders[:] = sorted(n for n in folders if not n.startswith(".") and Path(place, n) != without)
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_ENDINGS:
                images.append(path)
            else:
                others[path.suffix.lower() or "without ending"] += 1
    skipped = ", ".join(f"{number} {kind}" for kind, number in sorted(others.most_common(10)))
    hint = f"; {VIDEO_HINT}" if VIDEO_ENDINGS & others.keys() else ""
    return sorted(images), skipped and f"other files: {skipped}{hint}"


def spread_indices(count: int, images: int) -> list[int]:
    """`count` indices spread over `images` images, or all if there are fewer."""
    count = min(count, images)
    return [number * images // count for number in range(count)]
