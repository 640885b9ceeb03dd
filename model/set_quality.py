"""Quality of the sets that propagation chooses on frozen features, by labels (eval.py --measure-sets)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from loss import ieee_float32
from loss.propagation import Boundaries, Sets, propagations, select_sets
from model.module import PPAPModule
from utils.errors import UserError
from utils.files import make_folder, write_json
from utils.plots.figures import draw_sets
from utils.training.device import hardware_settings
from utils.training.randomness import generator
from utils.training.trainer import build_trainer
from utils.vision.labels import IGNORE

CHUNK = 256  # anchors that are compared with all patches of a batch at a time
MEASURES = ("precision", "recall", "purity", "positives", "negatives", "ambiguous", "chance")


def measure_sets(module: PPAPModule, data: Any, *, folder: Path) -> list[dict[str, float]]:
    """Writes sets.json and sets.png for the validation images, in batches as large as those of training.

    Args:
        module: network and criterion.
        data: the data module of the options.
        folder: for results.

    Returns:
        For t = 0..T means over anchors in percent: precision and recall of positives, purity of negatives,
        shares of positives, negatives and ambiguous patches, and `chance`, the precision of all patches.

    Raises:
        UserError: the validation split has no labels.
    """
    options, criterion = module.options, module.criterion
    if not data.validation_labelled:
        path = options.dataset.data_path
        raise UserError(f"dataset.data_path is {path}: --measure-sets needs labels of the validation split")
    trainer = build_trainer(options, hardware_settings(options))
    n_classes, patch = data.labels.n_classes, module.segmenter.backbone.spec.patch
    totals: Tensor | float = 0.0
    batches = DataLoader(data.validation_set, options.dataloader.batch_size)
    for step, batch in enumerate(tqdm(batches, desc="sets", unit="batch"), start=1):
        bank = criterion.bank(module.frozen_features(batch.image, trainer))  # (N, D)
        classes = patch_classes(batch.label, patch, n_classes=n_classes).to(bank.device)  # (N,)
        drawn = criterion.sample_anchors(len(classes), generator(options.train.seed, "anchors", step))
        for anchors in drawn[drawn >= 0].to(bank.device).split(CHUNK):
            totals = totals + set_quality(
                bank,
                classes,
                anchors=anchors,
                boundaries=criterion.boundaries,
                operand=criterion.similarity_dtype,
            )
    rows = means(totals)
    make_folder(folder)
    write_json(folder / "sets.json", rows)
    draw_sets(folder / "sets.png", rows, title=f"{options.dataset.data_type}, {n_classes} classes")
    return rows


def means(totals: Tensor) -> list[dict[str, float]]:
    """Means in percent by name for t = 0..T, of sums of `set_quality`; NaN if no anchor has such a set."""
    return [dict(zip(MEASURES, (100 * sums / counts).tolist(), strict=True)) for sums, counts in totals]


def set_quality(
    bank: Tensor,
    classes: Tensor,
    *,
    anchors: Tensor,
    boundaries: Boundaries,
    operand: torch.dtype = torch.float32,
) -> Tensor:
    """Sums of `MEASURES` over anchors, and the number of anchors that have each, for t = 0..T.

    Args:
        bank: f_j of all patches, (N, D) float32; see `PPAPLoss.bank`.
        classes: class of each patch, (N,) int64; patches with `IGNORE` are neither anchors nor counted.
        anchors: (A,) int64 indices into the N patches.
        boundaries: the coefficients.
        operand: `PPAPLoss.similarity_dtype`.

    Returns:
        (T + 1, 2, 7) float64 on the CPU.
    """
    labelled = classes != IGNORE  # (N,)
    anchors = anchors[labelled[anchors]]  # (A,)
    valid = labelled.repeat(len(anchors), 1).scatter_(1, anchors[:, None], False)  # (A, N)
    same = (classes[anchors][:, None] == classes) & valid  # (A, N)
    with torch.autocast(bank.device.type, enabled=False), ieee_float32():
        steps = propagations(bank[anchors], bank, boundaries, operand=operand)
        return torch.stack([_sums(select_sets(step, anchors), same, valid=valid) for step in steps])


def _sums(sets: Sets, same: Tensor, *, valid: Tensor) -> Tensor:
    """Sums and counts at one t, (2, 7); `same` (class) and `valid`, (A, N) bool, exclude the anchor."""
    positives = sets.positives & valid
    negatives = sets.negatives & valid & ~positives  # if Psi lies above Phi, a patch of both is positive
    ambiguous = valid & ~positives & ~negatives
    pairs = [  # in the order of MEASURES
        (positives & same, positives),
        (positives & same, same),
        (negatives & ~same, negatives),
        (positives, valid),
        (negatives, valid),
        (ambiguous, valid),
        (same, valid),
    ]
    part, whole = (torch.stack([pair[side].sum(dim=1) for pair in pairs]).cpu().double() for side in (0, 1))
    shares = torch.where(whole > 0, part / whole.clamp_min(1), 0)  # (7, A)
    return torch.stack([shares.sum(dim=1), (whole > 0).sum(dim=1).double()])


def patch_classes(label: Tensor, patch: int, *, n_classes: int) -> Tensor:
    """The most frequent class of each patch.

    Args:
        label: (B, H, W) int64, values outside [0, n_classes) are ignored; H and W are multiples of the patch.
        patch: side in pixels.
        n_classes: number of classes.

    Returns:
        (B*h*w,) int64, `IGNORE` if at least as many pixels are ignored as belong to any class.
    """
    known = (label >= 0) & (label < n_classes)  # (B, H, W)
    channel = torch.where(known, label + 1, 0)  # ignored pixels are channel 0, so that they win a tie
    votes = F.one_hot(channel, 1 + n_classes).permute(0, 3, 1, 2).float()  # (B, 1 + C, H, W)
    classes = F.avg_pool2d(votes, patch).argmax(dim=1).flatten() - 1  # (B*h*w,)
    return torch.where(classes < 0, IGNORE, classes)
