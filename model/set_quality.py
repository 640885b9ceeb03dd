"""How good the sets of a propagation are: held against labels, which the loss itself never sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from loss import ieee_float32
from loss.propagation import Boundaries, Sets, propagations, select_sets
from model.module import PPAPModule
from utils.training.randomness import generator
from utils.training.trainer import build_trainer, hardware_settings
from utils.vision.labels import IGNORE

ANCHORS_AT_ONCE = 256  # held against all patches of a batch


@dataclass(frozen=True)
class SetQuality:
    """Sums over anchors at one t; `means` gives what a reader wants.

    Attributes:
        sums: (7,) float64 on the CPU: precision, recall, purity, and the shares of positives, negatives
            and ambiguous patches, and the precision of taking every patch.
        counts: (7,) float64: anchors that each sum is over; one with an empty set has no precision.
    """

    sums: Tensor
    counts: Tensor

    def __add__(self, other: SetQuality) -> SetQuality:
        return SetQuality(self.sums + other.sums, self.counts + other.counts)

    def means(self) -> dict[str, float]:
        """Means over anchors in percent, by name; NaN where no anchor had such a set."""
        names = ("precision", "recall", "purity", "positives", "negatives", "ambiguous", "chance")
        return dict(zip(names, (100 * self.sums / self.counts).tolist(), strict=True))


def set_quality(
    bank: Tensor,
    classes: Tensor,
    *,
    anchors: Tensor,
    boundaries: Boundaries,
    operand: torch.dtype = torch.float32,
) -> list[SetQuality]:
    """The sets of a batch for t = 0..T relocations, by the arithmetic of the loss.

    Args:
        bank: f_j of every patch, (N, D) float32, as `PPAPLoss.bank` gives it.
        classes: (N,) int64, a patch's class; ignored patches (255) are neither anchors nor counted.
        anchors: (A,) int64 indices into the N patches.
        boundaries: the coefficients.
        operand: `PPAPLoss.similarity_dtype`.

    Returns:
        One entry for each t.
    """
    anchors = anchors[classes[anchors] != IGNORE]  # (A,)
    valid = (classes != IGNORE).repeat(len(anchors), 1).scatter_(1, anchors[:, None], False)  # (A, N)
    same = (classes[anchors][:, None] == classes) & valid  # (A, N)
    with torch.autocast(bank.device.type, enabled=False), ieee_float32():
        steps = propagations(bank[anchors], bank, boundaries, operand=operand)
        return [_held_against(select_sets(reached, anchors), same, valid=valid) for reached in steps]


def measured(module: PPAPModule, items: Dataset) -> list[dict[str, float]]:
    """The sets of frozen features over a split in batches of training's size; for t = 0..T percents by name.

    Args:
        module: network and criterion.
        items: labelled images, each an item with `image` and `label`.
    """
    options, criterion, total = module.options, module.criterion, None
    trainer = build_trainer(options, hardware_settings(options))
    batches = DataLoader(items, options.dataloader.batch_size)
    for step, batch in enumerate(tqdm(batches, desc="sets", unit="batch"), start=1):
        bank = criterion.bank(module.frozen_features(batch.image, trainer))  # (N, D)
        classes = patch_classes(batch.label, module.segmenter.backbone.spec.patch).to(bank.device)
        drawn = criterion.sample_anchors(len(classes), generator(options.train.seed, "anchors", step))
        for anchors in drawn[drawn >= 0].to(bank.device).split(ANCHORS_AT_ONCE):
            found = set_quality(
                bank,
                classes,
                anchors=anchors,
                boundaries=criterion.boundaries,
                operand=criterion.similarity_dtype,
            )
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    return [quality.means() for quality in total]


def _held_against(sets: Sets, same: Tensor, *, valid: Tensor) -> SetQuality:
    """Sums over anchors; `same` class and `valid`, (A, N) bool, leave out the anchor itself."""
    positives = sets.positives & valid
    negatives = sets.negatives & valid & ~positives  # where Psi lies above Phi, a positive stays one
    ambiguous = valid & ~positives & ~negatives
    pairs = [
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
    return SetQuality(shares.sum(dim=1), (whole > 0).sum(dim=1).double())


def patch_classes(label: Tensor, patch: int) -> Tensor:
    """The commonest value of each patch.

    Args:
        label: (B, H, W) int64, 255 = ignore; H and W multiples of the patch.
        patch: its side in pixels.

    Returns:
        (B * h * w,) int64, 255 where most pixels are ignored.
    """
    channel = (label + 1) % (IGNORE + 1)  # 0 = ignore, which wins a tie
    votes = F.one_hot(channel).permute(0, 3, 1, 2).float()  # (B, 1 + C, H, W)
    return ((F.avg_pool2d(votes, patch).argmax(dim=1) - 1) % (IGNORE + 1)).flatten()
