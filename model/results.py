"""Results of an evaluation: class IoU, confusion matrices, and pictures of some validation images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.evaluator import Evaluation, Prediction
from utils.plots.figures import IGNORED, UNMATCHED, colour, draw_class_iou, draw_confusion, draw_predictions
from utils.vision.labels import IGNORE, LabelSpace


def shown_indices(count: int, images: int) -> list[int]:
    """`count` indices spread over a split of `images` images, or all if it has fewer."""
    count = min(count, images)
    return [number * images // count for number in range(count)]


@dataclass(frozen=True)
class ShownImages:
    """The validation images that tables and pictures show.

    Attributes:
        images: (P, 3, H, W) uint8.
        names: P file names.
    """

    images: Tensor
    names: tuple[str, ...]

    @classmethod
    def load(cls, items: Any, count: int) -> ShownImages | None:
        """Loads the images at `shown_indices` of a `SegmentationDataset`; None if there are none."""
        indices = shown_indices(count, len(items))
        if not indices:
            return None
        images = torch.stack([items[index].image for index in indices])  # (P, 3, H, W)
        return cls(images, tuple(items.name(index) for index in indices))

    def pictures(self) -> np.ndarray:
        """(P, H, W, 3) uint8."""
        return self.images.permute(0, 2, 3, 1).numpy()


def class_iou(evaluation: Evaluation, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Head -> class name -> IoU in percent, of the heads that have scores."""
    return {head: dict(zip(names, scores.iou, strict=True)) for head, scores in evaluation.heads().items()}


def evaluation_result(
    plain: Evaluation, refined: Evaluation | None, *, names: Sequence[str]
) -> dict[str, Any]:
    """Images, losses, metrics, class IoU and matching, as metrics.json holds them."""
    stages = {"before_crf": plain, "after_crf": refined}
    return {
        "images": plain.images,
        "valid_loss": plain.valid_loss,
        **{stage: found and (found.metrics() or None) for stage, found in stages.items()},
        "class_iou": {stage: found and class_iou(found, names) for stage, found in stages.items()},
        "assignment": list(plain.cluster.assignment) if plain.cluster else None,
    }


def class_maps(prediction: Prediction, labels: LabelSpace, plain: Evaluation) -> dict[str, np.ndarray]:
    """Title -> class ids (H, W) of one image, `IGNORE` for none: truth, clusters, linear probe.

    Without labels, clusters cannot be matched: the first n_classes take the class ids in order.
    """
    clusters = prediction.cluster.numpy()  # (H, W)
    maps = {}
    if plain.cluster:
        maps["truth"] = prediction.label.numpy()
        clusters = np.array(plain.cluster.assignment)[clusters]  # (H, W), -1 if unmatched
    maps["clusters"] = clusters
    if prediction.linear is not None:
        maps["linear probe"] = prediction.linear.numpy()
    return {
        title: np.where((ids >= 0) & (ids < labels.n_classes), ids, IGNORE) for title, ids in maps.items()
    }


def write_pictures(
    folder: Path,
    labels: LabelSpace,
    *,
    predictions: Sequence[Prediction],
    plain: Evaluation,
    refined: Evaluation | None,
) -> None:
    """Writes confusion.npz, confusion.png and class_iou.png of the scores, and predictions.png.

    Args:
        folder: to write to.
        labels: class names and colours.
        predictions: images to show.
        plain: scores before CRF.
        refined: scores after CRF, or None.
    """
    counts = {head: scores.confusion for head, scores in plain.heads().items()}
    if counts:
        draw_confusion(folder / "confusion.png", counts, labels=labels)
        iou = {f"{head}, before CRF": each for head, each in class_iou(plain, labels.names).items()}
        if refined is not None:
            counts |= {f"{head}_crf": scores.confusion for head, scores in refined.heads().items()}
            iou |= {f"{head}, after CRF": each for head, each in class_iou(refined, labels.names).items()}
        draw_class_iou(folder / "class_iou.png", iou, labels=labels)
        np.savez(folder / "confusion.npz", class_names=np.array(labels.names), **counts)
    if predictions:
        rows = [_picture_row(prediction, labels, plain) for prediction in predictions]
        draw_predictions(folder / "predictions.png", rows, labels=labels)


def _picture_row(prediction: Prediction, labels: LabelSpace, plain: Evaluation) -> dict[str, np.ndarray]:
    """Title -> picture (H, W, 3) uint8: the image and its class maps."""
    row = {"image": prediction.image.permute(1, 2, 0).numpy()}  # (H, W, 3)
    for title, ids in class_maps(prediction, labels, plain).items():
        missing = UNMATCHED if title == "clusters" else IGNORED
        row[title] = colour(ids, labels, missing=missing)  # (H, W, 3)
    return row
