"""How good the sets of a propagation are: held against labels, which the loss itself never sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from loss import ieee_float32
from loss.propagation import Boundaries, Sets, propagate, select_sets


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
        classes: (N,) int64, a patch's class; patches below 0 are neither anchors nor counted.
        anchors: (A,) int64 indices into the N patches.
        boundaries: the coefficients.
        operand: `PPAPLoss.similarity_dtype`.

    Returns:
        One entry for each t.
    """
    anchors = anchors[classes[anchors] >= 0]  # (A,)
    valid = (classes >= 0).repeat(len(anchors), 1).scatter_(1, anchors[:, None], False)  # (A, N)
    same = (classes[anchors][:, None] == classes) & valid  # (A, N)
    found = []
    for steps in range(boundaries.steps + 1):
        with torch.autocast(bank.device.type, enabled=False), ieee_float32():
            reached = propagate(bank[anchors], bank, replace(boundaries, steps=steps), operand=operand)
        found.append(_held_against(select_sets(reached, anchors), same, valid=valid))
    return found


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
        label: (B, H, W) int64, -1 = ignore; H and W multiples of the patch.
        patch: its side in pixels.

    Returns:
        (B * h * w,) int64, -1 where most pixels are ignored.
    """
    votes = F.one_hot(label + 1).permute(0, 3, 1, 2).float()  # (B, 1 + C, H, W)
    return (F.avg_pool2d(votes, patch).argmax(dim=1) - 1).flatten()
