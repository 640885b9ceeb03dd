"""What propagation does for one anchor, step by step, by the arithmetic of the loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from pytorch_lightning import Trainer
from torch import Tensor

from loss import ieee_float32
from loss.propagation import Boundaries, Propagation, propagations, select_sets
from model.module import PPAPModule
from utils.errors import UserError
from utils.plots.explanation import AMBIGUOUS, ITSELF, NEGATIVE, POSITIVE, Explanation
from utils.training.trainer import build_trainer, hardware_settings


def explain(
    bank: Tensor,
    anchor: tuple[int, int, int],
    *,
    grid: tuple[int, int],
    boundaries: Boundaries,
    operand: torch.dtype = torch.float32,
) -> Explanation:
    """Follows one anchor's proxy for t = 0..T; a pure function of its arguments.

    Args:
        bank: f_j of every patch of B images, (B * h * w, D) float32, as `PPAPLoss.bank` gives it.
        anchor: (image, row, column) of the anchor's patch, from 0.
        grid: (h, w).
        boundaries: the coefficients.
        operand: `PPAPLoss.similarity_dtype`.

    Returns:
        Arrays on the CPU.

    Raises:
        ValueError: the bank is not made of such grids, or the anchor lies outside of it.
    """
    shape = (len(bank) // (grid[0] * grid[1]), *grid)  # (B, h, w)
    if np.prod(shape) != len(bank) or not all(0 <= at < n for at, n in zip(anchor, shape, strict=True)):
        raise ValueError(f"anchor (image, row, column) {anchor} and {len(bank)} patches of grids {grid}")
    index = torch.tensor([np.ravel_multi_index(anchor, shape)], device=bank.device)  # (1,)
    with torch.autocast(bank.device.type, enabled=False), ieee_float32():
        steps = propagations(bank[index], bank, boundaries, operand=operand)
        reached = [replace(at, similarity=at.similarity.clone()) for at in steps]
    similarity = torch.cat([at.similarity for at in reached])  # (T + 1, N)
    zones = torch.cat([_zones(at, index) for at in reached])  # (T + 1, N)
    return Explanation(
        anchor=anchor,
        similarity=similarity.cpu().numpy().reshape(-1, *shape),
        zones=zones.cpu().numpy().reshape(-1, *shape),
        phi=torch.cat([at.phi[:, 0] for at in reached]).cpu().numpy(),
        psi=torch.cat([at.psi[:, 0] for at in reached]).cpu().numpy(),
        moved=_moved(torch.cat([at.proxies for at in reached])).cpu().numpy(),
    )


def explain_images(
    module: PPAPModule, images: Tensor, *, patch: tuple[int, int] | None, trainer: Trainer | None = None
) -> Explanation:
    """Explains an anchor of the first of some images, in the bank of all their patches.

    Args:
        module: network and criterion; its frozen part alone is used, without dropout.
        images: (B, 3, H, W) uint8.
        patch: (row, column) of the anchor, from 0; None takes the centre.
        trainer: whose device and precision are taken; None makes one.

    Raises:
        UserError: the patch lies outside of the grid.
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
    parts = [module.frozen_features(part, trainer) for part in images.split(options.eval.batch_size)]
    return explain(
        criterion.bank(torch.cat(parts)),
        (0, row, column),
        grid=grid,
        boundaries=criterion.boundaries,
        operand=criterion.similarity_dtype,
    )


def _zones(reached: Propagation, index: Tensor) -> Tensor:
    """The set that each patch is in, (1, N) uint8."""
    sets = select_sets(reached, index)
    zones = torch.full_like(sets.positives, AMBIGUOUS, dtype=torch.uint8)  # (1, N)
    zones[sets.negatives] = NEGATIVE
    zones[sets.positives] = POSITIVE  # where Psi lies above Phi, a positive stays one
    return zones.index_fill_(1, index, ITSELF)


def _moved(proxies: Tensor) -> Tensor:
    """m_t of v_0..v_T, (T + 1, D) -> (T + 1,); exactly 0 for a proxy that stayed."""
    before, after = proxies[:-1], proxies[1:]
    moved = torch.where((before == after).all(dim=1), 0, 1 - (before * after).sum(dim=1))  # (T,)
    return torch.cat([moved.new_zeros(1), moved])
