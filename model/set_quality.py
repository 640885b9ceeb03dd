"""Quality of propagation's sets on frozen features, measured with labels (eval.py --measure-sets)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from loss import ieee_float32
from loss.propagation import Boundaries, propagations, select_sets
from model.module import PPAPModule
from utils.errors import UserError
from utils.files import make_folder, write_json
from utils.plots.figures import draw_sets
from utils.progress import Bar
from utils.training.randomness import generator
from utils.training.trainer import build_trainer
from utils.vision.labels import IGNORE

CHUNK = 256  # anchors that are compared with all patches of a batch at a time
# precision and recall of positives, purity of negatives, shares, and the precision of all patches
MEASURES = ("precision", "recall", "purity", "positives", "negatives", "ambiguous", "chance")


def measure_sets(module: PPAPModule, data: Any, *, folder: Path) -> list[dict[str, float]]:
    """Writes sets.json, whose content it returns, and sets.png for the validation images.

    Batches are as large as those of training; the rows for t = 0..T hold `means` over all anchors.
    """
    options, criterion, n_classes = module.options, module.method.criterion, data.labels.n_classes
    if not data.validation_labelled:
        path = options.dataset.data_path
        raise UserError(f"dataset.data_path is {path}: --measure-sets needs labels of the validation split")
    trainer, patch = build_trainer(options), module.segmenter.backbone.spec.patch
    batches = DataLoader(data.validation_set, options.dataloader.batch_size)
    totals: Tensor | float = 0.0
    for step, batch in enumerate(Bar(batches, desc="sets", unit="batch"), start=1):
        bank = criterion.bank(module.frozen_features(batch.image, trainer))  # (N, D)
        classes = patch_classes(batch.label, patch, n_classes=n_classes).to(bank.device)  # (N,)
        drawn = criterion.sample_anchors(len(classes), generator(options.train.seed, "anchors", step))
        for anchors in drawn[drawn >= 0].to(bank.device).split(CHUNK):
            totals = totals + set_quality(bank, classes, anchors, criterion.boundaries)
    rows = means(totals)
    write_json(make_folder(folder) / "sets.json", rows)
    draw_sets(folder / "sets.png", rows, title=f"{options.dataset.data_type}, {n_classes} classes")
    return rows


def means(totals: Tensor) -> list[dict[str, float]]:
    """Means in percent by name for t = 0..T, of sums of `set_quality`; NaN if no anchor has such a set."""
    return [dict(zip(MEASURES, (100 * sums / counts).tolist(), strict=True)) for sums, counts in totals]


def set_quality(bank: Tensor, classes: Tensor, anchors: Tensor, boundaries: Boundaries) -> Tensor:
    """Sums over anchors of `MEASURES`, and how many anchors have each, (T + 1, 2, 7) float64 on the CPU.

    `bank`, (N, D) float32, and `classes`, (N,) int64, hold f_j (see `PPAPLoss.bank`) and the class of all
    patches; those with `IGNORE` are neither anchors nor counted. `anchors`, (A,) int64, are indices of them.
    """
    labelled = classes != IGNORE  # (N,)
    anchors = anchors[labelled[anchors]]  # (A,)
    valid = labelled.repeat(len(anchors), 1).scatter_(1, anchors[:, None], False)  # (A, N)
    same = (classes[anchors][:, None] == classes) & valid  # (A, N)
    found = []
    with torch.autocast(bank.device.type, enabled=False), ieee_float32():
        for step in propagations(bank[anchors], bank, boundaries):
            sets = select_sets(step, anchors)
            positives = sets.positives & valid
            # if Psi lies above Phi, a patch in both sets counts as positive
            negatives = sets.negatives & valid & ~positives
            right, ambiguous = positives & same, valid & ~positives & ~negatives
            parts = (right, right, negatives & ~same, positives, negatives, ambiguous, same)  # as MEASURES
            wholes = (positives, same, negatives, valid, valid, valid, valid)
            part, whole = (torch.stack(each).sum(dim=2).cpu().double() for each in (parts, wholes))  # (7, A)
            shares = torch.where(whole > 0, part / whole.clamp_min(1), 0)  # (7, A)
            found.append(torch.stack([shares.sum(dim=1), (whole > 0).sum(dim=1).double()]))
    return torch.stack(found)


def patch_classes(label: Tensor, patch: int, *, n_classes: int) -> Tensor:
    """The most frequent class of each patch of labels (B, H, W) integer, (B*h*w,); `IGNORE` wins a tie."""
    channel = torch.where(label < n_classes, label.long() + 1, 0)  # ignored pixels are channel 0
    blocks = channel.unfold(1, patch, patch).unfold(2, patch, patch)  # (B, h, w, patch, patch)
    pixels = blocks.reshape(-1, patch**2)  # (B*h*w, patch**2)
    votes = pixels.new_zeros(len(pixels), 1 + n_classes).scatter_add_(1, pixels, torch.ones_like(pixels))
    classes = votes.argmax(dim=1) - 1  # (B*h*w,)
    return torch.where(classes < 0, IGNORE, classes)
