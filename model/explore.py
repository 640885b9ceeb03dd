"""A page on which any patch of some images can be the anchor (eval.py --explore)."""

import base64
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.criterion import build_criterion
from model.explain import build_bank, frozen_bank
from model.module import PPAPModule
from model.predictor import Predictor
from model.set_quality import patch_classes
from utils.config.loading import as_tree
from utils.errors import UserError
from utils.files import make_folder, write_text
from utils.plots.explain_figure import COLOURS, SETS
from utils.plots.report import render
from utils.vision.images import find_images, open_image
from utils.vision.transforms import Geometry

MAX_IMAGES, MAX_BYTES = 16, 8_000_000
MAX_SIDE = 320  # pixels of a picture on the page
MAX_NOISE = 5e-4  # standard deviation of a similarity's rounding error
CODE_BITS = 24
COEFFICIENTS = ("initialcrit_pos", "initialcrit_amb", "prop_iter", "sigma_pos", "sigma_amb")


class Classes(NamedTuple):
    """A class map of each image, to be shown beside the sets."""

    names: Sequence[str]
    palette: Sequence[tuple[int, int, int]]
    maps: Tensor  # (B, H, W) integer; other values than those of a name are ignored


def page_path(out: str) -> Path:
    """The file that --out names; its folder is created."""
    path = Path(out)
    if path.is_dir():
        raise UserError(f"--out is {path}: a folder, must be a file, such as {path / 'explore.html'}")
    make_folder(path.parent, named_by="--out")
    return path


def open_photographs(path: Path, geometry: Geometry, *, size: int) -> tuple[Tensor, list[str]]:
    """A photograph, or up to `size` spread over those in a folder, (B, 3, H, W) uint8, and their names."""
    if not path.exists():
        raise UserError(
            f"--explore is {path}, must be an image, a folder, or the index of a validation image"
        )
    found, others = ([path], "") if path.is_file() else find_images(path)
    if not found:
        raise UserError(f"--explore is {path}: it contains no image; {others}")
    count = min(size, len(found))
    if count < len(found):
        print(f"{path}: showing {count} of {len(found)} images")
    chosen = [found[number * len(found) // count] for number in range(count)]
    pixels = [np.asarray(geometry(open_image(file), None)[0]) for file in chosen]  # (H, W, 3) each
    names = [file.name if path.is_file() else str(file.relative_to(path)) for file in chosen]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), names


def explore(
    module: PPAPModule, data: Any, source: str, *, page: Path, predictor: Predictor | None = None
) -> None:
    """Writes the page for photographs, or without further images for those of `build_bank`, with labels.

    Args:
        data: the data of an evaluation; None if `source` is a photograph or a folder.
        source: a photograph, a folder, or the index of a validation image.
        predictor: source of the clusters, or None.
    """
    options, layers = module.options, {}
    size = min(MAX_IMAGES, options.dataloader.batch_size)
    if data is None:
        geometry = Geometry(options.dataset.val_res, "center", options.dataset.interpolation)
        images, names = open_photographs(Path(source), geometry, size=size)
    else:
        images, names = build_bank(data, source, size=size, flag="--explore")
        split = data.example_split()
        positions = {split.name(index): index for index in range(len(split))}
        maps = torch.stack([split[positions[name]].label for name in names])  # (B, H, W)
        if (maps < data.labels.n_classes).any():
            layers["labels"] = Classes(data.labels.names, data.labels.palette, maps)
        names = [Path(name).name for name in names]
    if predictor is not None:
        maps = [torch.from_numpy(predictor(image.permute(1, 2, 0).numpy())) for image in images]
        layers["clusters"] = Classes(predictor.names, predictor.palette, torch.stack(maps))
    write_page(page, module, images, names, layers)


def write_page(
    path: Path, module: PPAPModule, images: Tensor, names: Sequence[str], layers: dict[str, Classes]
) -> None:
    """Writes the page for images (B, 3, H, W) uint8.

    The bank are the frozen features of all images. Of `layers`, "labels" also gives precision, recall and
    purity.
    """
    options, (height, width) = module.options, module.segmenter.grid(images)
    bank = frozen_bank(module, images, criterion=build_criterion(options))  # (N, D)
    shown = {
        "sets": {"names": SETS, "colours": [[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in COLOURS]}
    }
    for title, (classes, palette, maps) in layers.items():
        ids = patch_classes(maps, images.shape[-1] // width, n_classes=len(classes))  # (N,)
        encoded = _base64(ids.to(torch.uint8).numpy().tobytes())
        shown[title] = {"names": classes, "colours": palette, "ids": encoded}
    content = {
        "grid": (height, width),
        "anchor": (height // 2) * width + width // 2,
        "pictures": [(name, _jpeg(image)) for name, image in zip(names, images, strict=True)],
        "coefficients": {key: as_tree(options)["training_coeff"][key] for key in COEFFICIENTS},
        "layers": shown,
    }
    empty = render(
        "explore.html", features={"codes": "", "scales": [0.0] * bank.shape[1], "count": 0}, **content
    )
    features = pack_features(bank.cpu(), (MAX_BYTES - len(empty.encode()) - 20 * bank.shape[1]) * 3 // 4)
    if features is None:
        shape = f"{len(images)} images of {height} x {width} patches with {bank.shape[1]} channels"
        raise UserError(
            f"--explore: {shape} do not fit into {MAX_BYTES // 10**6} MB; lower dataloader.batch_size "
            "(the number of images) or dataset.val_res"
        )
    write_text(path, render("explore.html", features=features, **content))
    print(f"\nresults: {path}, {path.stat().st_size / 1e6:.1f} MB; open it in a browser")


def pack_features(bank: Tensor, limit: int) -> dict[str, Any] | None:
    """f_j of N patches, (N, D) float32, in at most `limit` bytes; None if the error were too large.

    Principal axes are rounded to steps that are inversely proportional to their standard deviation, as the
    error of an axis is multiplied by a coordinate of a proxy. The page scales rows to unit length again.
    """
    count, dim = bank.shape
    variance, axes = torch.linalg.eigh(bank.double().T @ bank.double() / count)  # (D,), (D, D)
    deviation = variance.clamp_min(1e-12).sqrt()
    scaled = (bank.double() @ axes * deviation).numpy()  # (N, D); the step of all axes is equal now
    step = 2 * np.abs(scaled).max() / (2**CODE_BITS - 2)
    while step * (dim / 12) ** 0.5 <= MAX_NOISE:
        codes = np.rint(scaled / step).astype(np.int64)  # (N, D)
        codes = np.where(codes < 0, -2 * codes - 1, 2 * codes).astype("<u4").T  # (D, N)
        planes = np.stack([codes >> shift & 255 for shift in range(0, CODE_BITS, 8)]).astype(np.uint8)
        compressor = zlib.compressobj(strategy=zlib.Z_RLE)
        packed = compressor.compress(planes.tobytes()) + compressor.flush()
        if len(packed) <= limit:
            scales = [float(f"{scale:.7g}") for scale in (deviation[-1] / deviation).tolist()]
            return {"codes": _base64(packed), "scales": scales, "count": count}
        step *= max(1.02, 2 ** (8 * (len(packed) - limit) / codes.size))
    return None


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _jpeg(image: Tensor) -> str:
    """An image (3, H, W) uint8 as a data URL."""
    picture, file = Image.fromarray(image.permute(1, 2, 0).numpy()), io.BytesIO()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    picture.save(file, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{_base64(file.getvalue())}"
