"""The propagation of one anchor, step by step, computed as in the loss (eval.py --explain)."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.nn import functional as F

from loss import PPAPLoss, ieee_float32
from loss.propagation import Boundaries, propagations, select_sets
from model.module import PPAPModule
from utils.errors import UserError
from utils.files import make_folder, printable, read_json_object, write_json
from utils.plots.explain_figure import AMBIGUOUS, ANCHOR, NEGATIVE, POSITIVE, Explanation, draw_explanation
from utils.training.trainer import build_trainer
from utils.vision.images import open_image, spread_indices


def explain_image(
    module: PPAPModule, data: Any, *, image: str, patch: tuple[int, int] | None, folder: Path
) -> dict[str, Any]:
    """Draws <image>_<row>_<column>.png for one anchor, and adds its numbers to explain.json in the folder.

    `image` is a file or the index of a validation image; for `patch` see `explain_images`.
    """
    images, names = build_bank(data, image, size=module.options.dataloader.batch_size)
    found = explain_images(module, images, patch=patch)
    name = re.sub(r"[^\w.=+-]+", "_", f"{Path(names[0]).stem}_{found.anchor[0]}_{found.anchor[1]}")
    file = make_folder(folder) / "explain.json"
    pictures = images.permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    draw_explanation(folder / f"{name}.png", found, pictures=pictures, names=names)
    result = {"image": names[0], "patch": list(found.anchor), "grid": list(found.grid), "images": len(images)}
    result["steps"] = found.numbers()
    write_json(file, (read_json_object(file) if file.exists() else {}) | {name: result})
    return result


def build_bank(data: Any, image: str, *, size: int, flag: str = "--explain") -> tuple[Tensor, list[str]]:
    """An image and up to `size - 1` others spread over its split, (B, 3, H, W) uint8, and their names."""
    split = replace(data.example_split, hides_labels=True)
    names = [split.name(index) for index in range(len(split))]
    if image.isdecimal() and int(image) < len(split):
        first, image = split[int(image)].image, names[int(image)]
    elif Path(image).is_file():
        pixels, _ = split.geometry(open_image(Path(image)), None)
        first = torch.from_numpy(np.asarray(pixels).transpose(2, 0, 1).copy())  # (3, H, W)
    else:
        raise UserError(f"{flag} is {image}, must be an image file or an index from 0 to {len(split) - 1}")
    others = [index for index, name in enumerate(names) if Path(name).resolve() != Path(image).resolve()]
    chosen = [others[place] for place in spread_indices(size - 1, len(others))]
    images = torch.stack([first, *(split[index].image for index in chosen)])  # (B, 3, H, W)
    return images, [printable(image), *(names[index] for index in chosen)]


def explain_images(
    module: PPAPModule, images: Tensor, *, patch: tuple[int, int] | None, trainer: Trainer | None = None
) -> Explanation:
    """Explains a patch (row, column), or the central one, of the first of the images (B, 3, H, W) uint8.

    The features are frozen and without dropout; `trainer` defines device and precision.
    """
    criterion = module.method.criterion
    height, width = grid = module.segmenter.grid(images)
    row, column = patch or (height // 2, width // 2)
    if row >= height or column >= width:
        allowed = f"rows 0 to {height - 1} and columns 0 to {width - 1}"
        raise UserError(f"--patch is {row},{column}, but the patch grid has {allowed}")
    bank = frozen_bank(module, images, criterion, trainer)
    return explain(bank, (row, column), grid=grid, boundaries=criterion.boundaries)


def frozen_bank(
    module: PPAPModule, images: Tensor, criterion: PPAPLoss, trainer: Trainer | None = None
) -> Tensor:
    """f_j of all patches of images (B, 3, H, W) uint8, (B*h*w, D) float32; see `PPAPLoss.bank`."""
    options = module.options
    trainer = trainer or build_trainer(options)
    parts = [module.frozen_features(part, trainer) for part in images.split(options.eval.batch_size)]
    return criterion.bank(torch.cat(parts))


def explain(
    bank: Tensor, anchor: tuple[int, int], *, grid: tuple[int, int], boundaries: Boundaries
) -> Explanation:
    """Follows the proxy of a patch (row, column) of the first image for t = 0..T.

    `bank`, (B*h*w, D) float32, holds f_j of all patches of B images with a grid (h, w); see `PPAPLoss.bank`.
    """
    index = torch.tensor([anchor[0] * grid[1] + anchor[1]], device=bank.device)  # (1,)
    similarity, zones, steps = [], [], []
    with torch.autocast(bank.device.type, enabled=False), ieee_float32():
        for step in propagations(bank[index], bank, boundaries):
            sets = select_sets(step, index)
            zone = torch.full_like(sets.positives, AMBIGUOUS, dtype=torch.uint8)  # (1, N)
            zone[sets.negatives] = NEGATIVE
            zone[sets.positives] = POSITIVE  # also if Psi lies above Phi
            zone[0, index] = ANCHOR
            zones.append(zone.view(-1, *grid))  # (B, h, w)
            similarity.append(step.similarity.view(-1, *grid).clone())
            steps.append(step)
    proxies = torch.cat([step.proxies for step in steps])  # (T + 1, D)
    before, after = proxies[:-1], proxies[1:]
    moved = 1 - (before * after).sum(dim=1)  # (T,)
    moved[(before == after).all(dim=1)] = 0  # exactly, for a proxy that did not move
    phi, psi = torch.cat([step.phi for step in steps]), torch.cat([step.psi for step in steps])  # (T + 1, 1)
    rows = (torch.stack(similarity), torch.stack(zones), phi[:, 0], psi[:, 0], F.pad(moved, (1, 0)))
    return Explanation(anchor, *(values.cpu().numpy() for values in rows))
