"""Masks for a photograph or a folder of them: which images, where results go, one after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.errors import UserError
from utils.files import make_folder, write_json
from utils.plots.mask_files import write_mask, write_overlay
from utils.plots.mask_ids import MaskIds
from utils.vision.images import IMAGE_ENDINGS, VIDEO_ENDINGS, find_images, open_image

MASK, OVERLAY, LEGEND, LEGEND_DATA = "mask.png", "overlay.jpg", "legend.png", "legend.json"


@dataclass(frozen=True)
class Photograph:
    """A file, and the folder that its mask goes to."""

    path: Path
    folder: Path


@dataclass(frozen=True)
class Masked:
    """What became of some photographs.

    Attributes:
        images: how many have a mask.
        left_out: what is wrong with each of the others.
        legend: `id`, `name`, `colour` and `share` of the pixels in percent, of each id.
        seconds: that it took.
    """

    images: int
    left_out: tuple[str, ...]
    legend: tuple[dict[str, Any], ...]
    seconds: float


def find_photographs(images: Path, out: Path) -> list[Photograph]:
    """All photographs that a path means; `out` is left out where it lies among them.

    The folder of a result is the file's path below `images` without its ending; with its ending where two
    files would share one.

    Raises:
        UserError: there is none, or a result would lie among the photographs or upon one.
    """
    if not images.exists():
        raise UserError(f"--images is {images}: no such file or folder")
    if images.is_file():
        if images.suffix.lower() in VIDEO_ENDINGS:
            open_image(images)  # says how to make photographs of it
        found, below = [images], images.parent
    else:
        found, below = _images_in(images, out), images
    names = result_names([path.relative_to(below) for path in found])
    photographs = [Photograph(path, out / name) for path, name in zip(found, names, strict=True)]
    sources = {path.resolve() for path in found}
    for photograph in photographs:
        for name in (MASK, OVERLAY):
            if (photograph.folder / name).resolve() in sources:
                raise UserError(f"--out is {out}: {photograph.folder / name} is a photograph; choose another")
    return photographs


def _images_in(folder: Path, out: Path) -> list[Path]:
    inside = out.resolve().is_relative_to(folder.resolve())
    if inside and out.resolve() == folder.resolve():
        raise UserError(f"--out is {out}, the folder of the photographs; choose another, or one below it")
    without = folder / out.resolve().relative_to(folder.resolve()) if inside else None
    found = find_images(folder, without=without)
    passed_over = found.passed_over()
    if not found.images:
        endings = ", ".join(sorted(IMAGE_ENDINGS))
        raise UserError(
            f"--images is {folder}, which holds no image ({endings})"
            + (f"; {passed_over}" if passed_over else "")
        )
    if passed_over:
        print(f"{folder}: left out: {passed_over}")
    return found.images


def result_names(files: list[Path]) -> list[Path]:
    """A folder for each file: its path without the ending, or with it where that is another's too.

    Names that differ in case alone are taken for equal, as some file systems do.
    """
    taken = (MASK, OVERLAY, LEGEND, LEGEND_DATA)
    names = [file.with_suffix("") for file in files]
    while True:
        count = Counter(str(name).casefold() for name in names)
        longer = [
            file if count[str(name).casefold()] > 1 or name.name.casefold() in taken else name
            for file, name in zip(files, names, strict=True)
        ]
        if longer == names:
            return names
        names = longer


def write_masks(
    segment: Callable[[Image.Image], np.ndarray], photographs: list[Photograph], *, out: Path, ids: MaskIds
) -> Masked:
    """mask.png and overlay.jpg of each photograph, and a legend of all; those that are there are replaced.

    Args:
        segment: from an image to ids (H, W) uint8.
        photographs: from `find_photographs`.
        out: folder of the legend.
        ids: names and colours.

    Raises:
        UserError: a result cannot be written.
    """
    from utils.plots.figures import draw_legend

    make_folder(out, named_by="--out")
    counts, left_out, began = np.zeros(len(ids.names), dtype=np.int64), [], perf_counter()
    for photograph in tqdm(photographs, desc="masks", unit="image"):
        try:
            image = open_image(photograph.path)
            classes = segment(image)
        except UserError as error:
            words = str(error)
            left_out.append(words if str(photograph.path) in words else f"{photograph.path}: {words}")
            tqdm.write(f"left out: {left_out[-1]}")
            continue
        write_mask(photograph.folder / MASK, classes, ids)
        write_overlay(photograph.folder / OVERLAY, image, classes, ids=ids)
        counts += np.bincount(classes.ravel(), minlength=len(counts))
    seconds = perf_counter() - began
    legend = _legend(ids, counts)
    done = len(photographs) - len(left_out)
    write_json(out / LEGEND_DATA, {"ids": legend, "images": done, "left_out": left_out})
    draw_legend(out / LEGEND, legend)
    return Masked(done, tuple(left_out), legend, seconds)


def _legend(ids: MaskIds, counts: np.ndarray) -> tuple[dict[str, Any], ...]:
    """A row for each id, from the number of its pixels."""
    shares = (100 * counts / max(1, counts.sum())).tolist()
    rows = zip(ids.names, ids.palette, shares, strict=True)
    return tuple(
        {"id": number, "name": name, "colour": list(colour), "share": share}
        for number, (name, colour, share) in enumerate(rows)
    )
