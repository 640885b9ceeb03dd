"""Pixel confusion over a whole set, and the four metrics that are read off it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric


class ConfusionMatrix(Metric):
    """Counts of (true class, prediction) over all pixels with a label in [0, n_classes).

    Of several processes each counts for itself; the evaluator adds them up.

    Args:
        n_classes: C, rows.
        n_predictions: columns; C for the linear probe, C plus extra clusters for the cluster probe.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, n_classes: int, n_predictions: int) -> None:
        super().__init__(sync_on_compute=False)
        self.n_classes, self.n_predictions = n_classes, n_predictions
        self.add_state(
            "counts", torch.zeros(n_classes, n_predictions, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Adds a batch: both (..., H, W) integer, predictions in [0, n_predictions)."""
        label, prediction = label.flatten().long(), prediction.flatten().long()
        valid = (label >= 0) & (label < self.n_classes)
        flat = torch.where(valid, label * self.n_predictions + prediction, self.counts.numel())
        counts = torch.bincount(flat, minlength=self.counts.numel() + 1)[:-1]
        self.counts = self.counts + counts.view_as(self.counts)  # not in place: may be an inference tensor

    def compute(self) -> Tensor:
        """(C, n_predictions) int64."""
        return self.counts


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says.

    Attributes:
        accuracy: share of valid pixels that are right, in percent.
        miou: mean IoU over the classes with a pixel in their union, in percent.
        iou: IoU per class in percent, NaN for a class with an empty union.
        assignment: class of each prediction; -1 for a cluster without one.
        confusion: (C, C + 1) counts, truth by matched class; the last column holds unmatched clusters.
    """

    accuracy: float
    miou: float
    iou: tuple[float, ...]
    assignment: tuple[int, ...]
    confusion: np.ndarray


def score(counts: Tensor | np.ndarray, *, matched: bool) -> Scores | None:
    """Accuracy and mIoU of a (C, P) confusion; None where it is empty.

    Args:
        counts: true class by prediction, P >= C.
        matched: whether predictions are clusters, to be matched to classes by the Hungarian method on
            counts. The pixels of clusters that stay unmatched are misses of their true class (the
            published metric drops them, so that wrong pixels go uncounted).
    """
    counts = np.asarray(counts, dtype=np.int64)
    n_classes, n_predictions = counts.shape
    if counts.sum() == 0:
        return None
    assignment = np.full(n_predictions, -1)
    if matched:
        classes, clusters = linear_sum_assignment(counts, maximize=True)
        assignment[clusters] = classes
    else:
        assignment[:n_classes] = np.arange(n_classes)
    confusion = np.zeros((n_classes, n_classes + 1), dtype=np.int64)
    for prediction, class_id in enumerate(assignment):  # -1 is the last column
        confusion[:, class_id] += counts[:, prediction]
    right = np.diagonal(confusion)
    union = confusion.sum(axis=1) + confusion[:, :n_classes].sum(axis=0) - right
    with np.errstate(invalid="ignore"):
        iou = 100 * right / union
    return Scores(
        accuracy=float(100 * right.sum() / confusion.sum()),
        miou=float(np.nanmean(iou)),
        iou=tuple(map(float, iou)),
        assignment=tuple(map(int, assignment)),
        confusion=confusion,
    )
