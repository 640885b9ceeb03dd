"""Pixel confusion over a whole set, and the metrics computed from it."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def confusion(prediction: Tensor, label: Tensor, shape: tuple[int, int]) -> Tensor:
    """Counts (C, P) int64 of true class and prediction; labels outside [0, C) are ignored.

    Both are (..., H, W) integer, predictions in [0, P).
    """
    label, prediction = label.flatten().long(), prediction.flatten().long()
    valid, size = (label >= 0) & (label < shape[0]), shape[0] * shape[1]
    flat = torch.where(valid, label * shape[1] + prediction, size)
    # unlike bincount, scatter_add_ does not wait for a GPU
    return flat.new_zeros(size + 1).scatter_add_(0, flat, torch.ones_like(flat))[:-1].view(shape)


@dataclass(frozen=True)
class Scores:
    """Metrics of a confusion matrix, in percent."""

    accuracy: float  # share of valid pixels that are correct
    miou: float  # mean IoU over the classes with a pixel in their union
    iou: tuple[float, ...]  # IoU of each class, NaN if its union is empty
    assignment: tuple[int, ...]  # class of each prediction; -1 for an unmatched cluster
    confusion: np.ndarray  # (C, C + 1) counts, truth by matched class; the last column is unmatched clusters


def score(counts: Tensor | np.ndarray, *, matched: bool) -> Scores | None:
    """Accuracy and mIoU of counts of true class by prediction, (C, P) with P >= C; None if there are none.

    `matched` predictions are clusters, which the Hungarian method matches to classes by counts. Pixels of
    unmatched clusters are misses of their true class; the published metric drops them.
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
