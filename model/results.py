"""What an evaluation leaves behind: IoU by name, confusion matrices, pictures of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.evaluator import Evaluation, Prediction
from model.module import PPAPModule
from utils.pictures import UNMATCHED, colour, draw_confusion, draw_predictions


def class_iou(evaluation: Evaluation, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Head -> class name -> IoU in percent, of the heads that have scores."""
    return {head: dict(zip(names, scores.iou, strict=True)) for head, scores in evaluation.heads().items()}


def write_pictures(
    folder: Path, module: PPAPModule, *, plain: Evaluation, refined: Evaluation | None
) -> None:
    """confusion.npz and confusion.png for all that was scored, predictions.png for some images.

    Args:
        folder: where they go.
        module: has the classes and, in its evaluator, the images to show.
        plain: scores before CRF.
        refined: scores after CRF, if there are any.
    """
    labels = module.labels
    counts = {head: scores.confusion for head, scores in plain.heads().items()}
    if counts:
        draw_confusion(folder / "confusion.png", counts, labels=labels)
        if refined is not None:
            counts |= {f"{head}_crf": scores.confusion for head, scores in refined.heads().items()}
        np.savez(folder / "confusion.npz", class_names=np.array(labels.names), **counts)
    if module.evaluator.pictures:
        rows = [picture_row(prediction, module, plain) for prediction in module.evaluator.pictures]
        draw_predictions(folder / "predictions.png", rows, labels=labels)


def picture_row(prediction: Prediction, module: PPAPModule, plain: Evaluation) -> dict[str, np.ndarray]:
    """Title -> picture (H, W, 3) uint8 of one image: as it is, truth, clusters, linear probe."""
    labels = module.labels
    # without labels nothing is matched: clusters take the colours in turn, extra ones none
    extra = module.options.model.extra_clusters
    unscored = (*range(labels.n_classes), *[-1] * extra)
    assignment = np.array(plain.cluster.assignment if plain.cluster else unscored)
    row = {"image": prediction.image.permute(1, 2, 0).numpy()}
    if plain.cluster:
        row["truth"] = colour(prediction.label.numpy(), labels)
    row["clusters"] = colour(assignment[prediction.cluster.numpy()], labels, missing=UNMATCHED)
    if prediction.linear is not None:
        row["linear probe"] = colour(prediction.linear.numpy(), labels)
    return row
