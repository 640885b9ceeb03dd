"""The propagation of one anchor, step by step, by the arithmetic of the loss (eval.py --explain)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from torch import Tensor

from loss import ieee_float32
from loss.propagation import Boundaries, Propagation, propagations, select_sets
from model.module import PPAPModule
from utils.errors import UserError
from utils.files import make_folder, read_json_object, write_json
from utils.plots.explain_figure import AMBIGUOUS, ANCHOR, NEGATIVE, POSITIVE, Explanation, draw_explanation
from utils.training.device import hardware_settings
from utils.training.trainer import build_trainer
from utils.vision.images import open_image

EXPLANATIONS = "explain.json"


@dataclass(frozen=True)
class Bank:
    """The image of an anchor and others, whose patches the anchor is compared with.

    Attributes:
        images: (B, 3, H, W) uint8, that of the anchor first.
        names: file or name of each image.
        about: a description.
    """

    images: Tensor
    names: tuple[str, ...]
    about: str


def explain_image(
    module: PPAPModule, data: Any, *, image: str, patch: tuple[int, int] | None, folder: Path
) -> dict[str, Any]:
    """Draws <image>_<row>_<column>.png for one anchor, and adds its numbers to explain.json.

    Args:
        module: network and criterion; only the frozen part is used.
        data: the data module of the options.
        image: an image file, or the index of a validation image.
        patch: (row, column) of the anchor on the patch grid, from 0; None is the centre.
        folder: for results; earlier explanations in it are kept.

    Returns:
        `image`, `patch`, `grid`, `images` (size of the bank) and `steps` (`Explanation.numbers`).

    Raises:
        UserError: there is no such image or patch.
    """
    bank = build_bank(data, image, size=module.options.dataloader.batch_size)
    found = explain_images(module, bank.images, patch=patch)
    _, row, column = found.anchor
    name = re.sub(r"[^\w.=+-]+", "_", f"{Path(bank.names[0]).stem}_{row}_{column}")
    pictures = bank.images.permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    file = make_folder(folder) / EXPLANATIONS
    draw_explanation(folder / f"{name}.png", found, pictures=pictures, names=bank.names, about=bank.about)
    result = {
        "image": bank.names[0],
        "patch": [row, column],
        "grid": list(found.grid),
        "images": len(pictures),
        "steps": found.numbers(),
    }
    write_json(file, (read_json_object(file) if file.exists() else {}) | {name: result})
    return result


def build_bank(data: Any, image: str, *, size: int) -> Bank:
    """An image and at most `size - 1` others, evenly spread over the validation split, at its geometry.

    Without validation images the others are train images.

    Raises:
        UserError: there is no such image, or a file is damaged.
    """
    split, kind = data.example_split(), "validation" if len(data.validation_set) else "train"
    if re.fullmatch(r"-?\d+", image):
        index, count = int(image), len(data.validation_set)
        if not 0 <= index < count:
            raise UserError(f"--explain is {image}, but there are {count} validation images, numbered from 0")
    else:
        names = (Path(split.name(index)).resolve() for index in range(len(split)))
        index = next((index for index, name in enumerate(names) if name == Path(image).resolve()), None)
    if index is None:
        if not Path(image).is_file():
            raise UserError(f"--explain is {image}: no such file; name an image or give a validation index")
        pixels, _ = split.geometry(open_image(Path(image)), None)
        first, name = torch.from_numpy(np.asarray(pixels).transpose(2, 0, 1).copy()), image  # (3, H, W)
    else:
        first, name = split[index].image, split.name(index)
    others = [other for other in range(len(split)) if other != index]
    count = min(size - 1, len(others))
    chosen = [others[number * len(others) // count] for number in range(count)]
    about = f"bank: {1 + count} images, this one and {count} of the {kind} split"
    return Bank(
        torch.stack([first, *(split[other].image for other in chosen)]),  # (B, 3, H, W)
        (name, *(split.name(other) for other in chosen)),
        about if count else "bank: this image alone",
    )


def explain_images(
    module: PPAPModule, images: Tensor, *, patch: tuple[int, int] | None, trainer: Trainer | None = None
) -> Explanation:
    """Explains an anchor of the first image in the bank of all patches, on frozen features without dropout.

    Args:
        module: network and criterion.
        images: (B, 3, H, W) uint8.
        patch: (row, column) of the anchor, from 0; None is the centre.
        trainer: defines device and precision; None builds one.

    Raises:
        UserError: the patch lies outside the grid.
    """
    options, criterion = module.options, module.criterion
    height, width = grid = module.segmenter.grid(images)
    row, column = patch or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise UserError(
            f"--patch is {row},{column}, but the grid has {height} rows and {width} columns: rows are 0 to "
            f"{height - 1}, columns 0 to {width - 1}"
        )
    trainer = trainer or build_trainer(options, hardware_settings(options))
    features = [module.frozen_features(part, trainer) for part in images.split(options.eval.batch_size)]
    return explain(
        criterion.bank(torch.cat(features)),
        (0, row, column),
        grid=grid,
        boundaries=criterion.boundaries,
        operand=criterion.similarity_dtype,
    )


def explain(
    bank: Tensor,
    anchor: tuple[int, int, int],
    *,
    grid: tuple[int, int],
    boundaries: Boundaries,
    operand: torch.dtype = torch.float32,
) -> Explanation:
    """Follows the proxy of one anchor for t = 0..T.

    Args:
        bank: f_j of all patches of B images, (B*h*w, D) float32; see `PPAPLoss.bank`.
        anchor: (image, row, column) of the anchor's patch, from 0.
        grid: (h, w).
        boundaries: the coefficients.
        operand: `PPAPLoss.similarity_dtype`.
    """
    shape = (-1, *grid)  # (B, h, w)
    index = torch.tensor(
        [(anchor[0] * grid[0] + anchor[1]) * grid[1] + anchor[2]], device=bank.device
    )  # (1,)
    with torch.autocast(bank.device.type, enabled=False), ieee_float32():
        steps = propagations(bank[index], bank, boundaries, operand=operand)
        reached = [replace(step, similarity=step.similarity.clone()) for step in steps]
    proxies = torch.cat([step.proxies for step in reached])  # (T + 1, D)
    return Explanation(
        anchor=anchor,
        similarity=np.stack([step.similarity.cpu().numpy().reshape(shape) for step in reached]),
        zones=np.stack([_zones(step, index).cpu().numpy().reshape(shape) for step in reached]),
        phi=torch.cat([step.phi[:, 0] for step in reached]).cpu().numpy(),
        psi=torch.cat([step.psi[:, 0] for step in reached]).cpu().numpy(),
        moved=_moved(proxies).cpu().numpy(),
    )


def _zones(reached: Propagation, index: Tensor) -> Tensor:
    """The set of each patch, (1, N) uint8."""
    sets = select_sets(reached, index)
    zones = torch.full_like(sets.positives, AMBIGUOUS, dtype=torch.uint8)  # (1, N)
    zones[sets.negatives] = NEGATIVE
    zones[sets.positives] = POSITIVE  # also if Psi lies above Phi
    return zones.index_fill_(1, index, ANCHOR)


def _moved(proxies: Tensor) -> Tensor:
    """m_t of the proxies v_0..v_T, (T + 1, D) -> (T + 1,); exactly 0 for a proxy that did not move."""
    before, after = proxies[:-1], proxies[1:]
    moved = torch.where((before == after).all(dim=1), 0, 1 - (before * after).sum(dim=1))  # (T,)
    return torch.cat([moved.new_zeros(1), moved])
