"""What an evaluation leaves behind: IoU by name, confusion matrices, pictures of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.evaluator import Evaluation, Prediction
from model.module import PPAPModule
from utils.plots.figures import IGNORED, UNMATCHED, colour, draw_class_iou, draw_confusion, draw_predictions
from utils.vision.labels import IGNORE


def class_iou(evaluation: Evaluation, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Head -> class name -> IoU in percent, of the heads that have scores."""
    return {head: dict(zip(names, scores.iou, strict=True)) for head, scores in evaluation.heads().items()}


def write_pictures(
    folder: Path, module: PPAPModule, *, plain: Evaluation, refined: Evaluation | None, predictions
) -> None:
    """confusion.npz, confusion.png and class_iou.png for what was scored, predictions.png for some images.

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
        iou = {f"{head}, before CRF": each for head, each in class_iou(plain, labels.names).items()}
        if refined is not None:
            counts |= {f"{head}_crf": scores.confusion for head, scores in refined.heads().items()}
            iou |= {f"{head}, after CRF": each for head, each in class_iou(refined, labels.names).items()}
        draw_class_iou(folder / "class_iou.png", iou, labels=labels)
        np.savez(folder / "confusion.npz", class_names=np.array(labels.names), **counts)
    if predictions:
        rows = [picture_row(prediction, module, plain) for prediction in predictions]
        draw_predictions(folder / "predictions.png", rows, labels=labels)


def picture_row(prediction: Prediction, module: PPAPModule, plain: Evaluation) -> dict[str, np.ndarray]:
    """Title -> picture (H, W, 3) uint8 of one image: as it is, truth, clusters, linear probe."""
    missing = {"clusters": UNMATCHED}
    return {"image": prediction.image.permute(1, 2, 0).numpy()} | {
        title: colour(classes, module.labels, missing=missing.get(title, IGNORED))
        for title, classes in class_maps(prediction, module, plain).items()
    }


def class_maps(prediction: Prediction, module: PPAPModule, plain: Evaluation) -> dict[str, np.ndarray]:
    """Title -> classes (H, W) int64 of one image, 255 = none; in the pictures' order."""
    labels = module.labels
    # without labels nothing is matched: clusters take the colours in turn, extra ones none
    extra = module.options.model.extra_clusters
    unscored = (*range(labels.n_classes), *[IGNORE] * extra)
    assignment = np.array(plain.cluster.assignment if plain.cluster else unscored)
    maps = {"truth": prediction.label.numpy()} if plain.cluster else {}
    maps["clusters"] = np.where(assignment < 0, IGNORE, assignment)[prediction.cluster.numpy()]
    if prediction.linear is not None:
        maps["linear probe"] = prediction.linear.numpy()
    return maps
