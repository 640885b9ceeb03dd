"""A page on which any patch of some images can be the anchor (eval.py --explore)."""

import base64
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from model.explain import build_bank, frozen_bank
from model.methods.ppap import build_criterion
from model.module import PPAPModule
from model.predictor import Predictor
from model.set_quality import patch_classes
from utils.config.loading import as_tree
from utils.config.options import Options
from utils.errors import UserError
from utils.files import make_folder, printable, write_text
from utils.plots.figures import SET_COLOURS
from utils.plots.report import render
from utils.vision.images import find_images, open_image, spread_indices
from utils.vision.labels import LabelSpace
from utils.vision.transforms import Geometry

MAX_IMAGES, MAX_BYTES = 16, 8_000_000
MAX_SIDE = 320  # pixels of a picture on the page
MAX_NOISE = 2e-5  # standard deviation of a rounded similarity; more moves patches across boundaries
CODE_BITS = 24
SCALE_BYTES = 20  # at most, of an axis
COEFFICIENTS = ("initialcrit_pos", "initialcrit_amb", "prop_iter", "sigma_pos", "sigma_amb")


def explore(
    module: PPAPModule,
    data: Any,
    source: str,
    *,
    page: Path,
    labels: LabelSpace | None = None,
    predictor: Predictor | None = None,
) -> None:
    """Writes the page: all frozen features, and as further layers the labels and clusters that are known.

    `source` is the index of a validation image of `data`, or, if that is None, a photograph or a folder.
    """
    if page.is_dir():
        raise UserError(f"--out is {page}: a folder, must be a file, such as {page / 'explore.html'}")
    make_folder(page.parent, named_by="--out")
    options, patch = module.options, module.segmenter.backbone.spec.patch
    layers = {"sets": {"colours": [ImageColor.getrgb(colour) for colour in SET_COLOURS]}}
    size = min(MAX_IMAGES, options.dataloader.batch_size)
    if data is None:
        images, names = open_photographs(Path(source), options, size=size)
    else:
        images, names = build_bank(data, source, size=size, flag="--explore")
        if labels is not None:
            split = data.example_split
            places = {split.name(index): index for index in range(len(split))}
            maps = torch.stack([split[places[name]].label for name in names])  # (B, H, W)
            if (maps < labels.n_classes).any():
                layers["labels"] = _layer(maps, labels.names, labels.palette, patch=patch)
    if predictor is not None:
        maps = [torch.from_numpy(predictor(image.permute(1, 2, 0).numpy())) for image in images]
        layers["clusters"] = _layer(torch.stack(maps), predictor.names, predictor.palette, patch=patch)
    bank = frozen_bank(module, images, build_criterion(options)).cpu()  # (N, D)
    write_page(page, bank, images, names, layers=layers, grid=module.segmenter.grid(images), options=options)


def open_photographs(path: Path, options: Options, *, size: int) -> tuple[Tensor, list[str]]:
    """A photograph, or up to `size` spread over those in a folder, (B, 3, H, W) uint8, and their names."""
    found, others = find_images(path) if path.is_dir() else ([path], "")
    if size < len(found):
        print(f"{path}: showing {size} of {len(found)} images, see dataloader.batch_size")
    geometry = Geometry(options.dataset.val_res, "center", options.dataset.interpolation)
    pixels, names = [], []
    for file in (found[place] for place in spread_indices(size, len(found))):
        try:
            pixels.append(np.asarray(geometry(open_image(file), None)[0]))  # (H, W, 3)
            names.append(printable(file))
        except UserError as error:
            print(f"{error}; skipped")
    if not pixels:
        wanted = "must be an image, a folder of images, or the index of a validation image"
        raise UserError("; ".join(filter(None, (f"--explore is {path}, {wanted}", others))))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), names


def _layer(maps: Tensor, names: Sequence[str], palette: Sequence[Any], *, patch: int) -> dict[str, Any]:
    """The most frequent class of each patch of class maps (B, H, W), and the classes."""
    ids = patch_classes(maps, patch, n_classes=len(names))  # (N,)
    return {"names": names, "colours": palette, "ids": _base64(ids.to(torch.uint8).numpy().tobytes())}


def write_page(
    page: Path,
    bank: Tensor,
    images: Tensor,
    names: Sequence[str],
    *,
    layers: dict[str, Any],
    grid: tuple[int, int],
    options: Options,
) -> None:
    """Writes a page of at most `MAX_BYTES` for the bank (N, D) of images (B, 3, H, W) uint8."""
    (height, width), (count, dim) = grid, bank.shape
    content = {
        "grid": grid,
        "anchor": height // 2 * width + width // 2,
        "pictures": [(Path(name).name, _jpeg(image)) for name, image in zip(names, images, strict=True)],
        "coefficients": {key: as_tree(options)["training_coeff"][key] for key in COEFFICIENTS},
        "layers": layers,
    }
    without = render("explore.html", features={"count": count}, **content)
    features = pack_features(bank, limit=(MAX_BYTES - len(without.encode()) - SCALE_BYTES * dim) * 3 // 4)
    write_text(page, render("explore.html", features=features, **content))
    print(f"\nresults: {page}; {page.stat().st_size / 1e6:.2f} MB, opens in any browser")


def pack_features(bank: Tensor, *, limit: int) -> dict[str, Any]:
    """f_j of N patches, (N, D) float32, in at most `limit` bytes; a UserError if the error is too large.

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
    raise UserError(
        f"--explore: the features of {count:,} patches do not fit into {MAX_BYTES // 10**6} MB; lower "
        "dataloader.batch_size, the number of images, or dataset.val_res"
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _jpeg(image: Tensor) -> str:
    """An image (3, H, W) uint8 as a data URL."""
    picture, file = Image.fromarray(image.permute(1, 2, 0).numpy()), io.BytesIO()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    picture.save(file, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{_base64(file.getvalue())}"
