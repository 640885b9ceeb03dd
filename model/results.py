"""Results of an evaluation: metrics.json, confusion matrices, and pictures of some validation images."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pytorch_lightning import Trainer

from model.evaluator import Evaluation, Prediction
from model.module import PPAPModule
from model.monitoring import sets_warning
from utils.errors import first_line
from utils.files import replacing
from utils.plots.figures import IGNORED, UNMATCHED, colour, draw_class_iou, draw_confusion, draw_predictions
from utils.plots.report import read_scalars
from utils.vision.labels import IGNORE, LabelSpace


def run_summary(module: PPAPModule, data: Any, trainer: Trainer, *, folder: Path) -> str:
    """Five-line summary of a run, printed before training."""
    options, spec = module.options, module.segmenter.backbone.spec
    arch = " ".join(filter(None, (options.model.arch, options.model.name)))
    labels = "labels" if data.train_labelled else "no labels"
    batches, epochs = len(data.train_dataloader()), options.train.epoch
    steps = min(batches * epochs, options.train.max_steps or batches * epochs)
    epochs = math.ceil(steps / batches)
    device, precision = trainer.strategy.root_device, trainer.precision_plugin.precision
    items = f"{len(data.train_set):,} items to train on, {len(data.validation_set):,} to evaluate"
    lines = {
        "data": f"{options.dataset.data_type}, {data.labels.n_classes} classes, {items}, {labels}",
        "backbone": f"{arch}, {spec.depth} blocks of width {spec.dim}, {module.weights}",
        "device": f"{trainer.world_size} x {device.type}, precision {precision}",
        "steps": f"{steps:,}: {epochs} epoch{'s' if epochs > 1 else ''} of {batches:,}",
        "folder": f"{folder}, which will contain report.html",
    }
    return "\n".join(f"{name:10}{words}" for name, words in lines.items())


def training_cost(module: PPAPModule, folder: Path, *, seconds: float) -> dict[str, Any]:
    """Hours of training, median seconds of a step, trainable parameters, and the warning about the sets."""
    rows, options, spec = read_scalars(folder / "metrics.csv"), module.options, module.segmenter.backbone.spec
    rates = [row["images_per_s"] for row in rows if "images_per_s" in row]
    parameters = [each for group, _ in module.method.groups(module.segmenter) for each in group]
    cost = {"train_hours": seconds / 3600, "trainable_parameters": sum(each.numel() for each in parameters)}
    if rates:  # without validations
        cost["step_seconds"] = options.dataloader.batch_size / median(rates)
    patches = options.dataloader.batch_size * (options.dataset.res // spec.patch) ** 2
    warning = sets_warning(rows, patches=patches)
    return cost | ({"warning": warning} if warning else {})


def class_iou(evaluation: Evaluation, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Head -> class name -> IoU in percent, of the heads that have scores."""
    return {head: dict(zip(names, scores.iou, strict=True)) for head, scores in evaluation.scores.items()}


def evaluation_result(
    plain: Evaluation, refined: Evaluation | None, *, names: Sequence[str]
) -> dict[str, Any]:
    """Images, losses, metrics, class IoU and matching, as stored in metrics.json."""
    result = {"images": plain.images, "valid_loss": plain.valid_loss, "class_iou": {}}
    for stage, found in {"before_crf": plain, "after_crf": refined}.items():
        result[stage] = found and (found.metrics() or None)
        result["class_iou"][stage] = found and class_iou(found, names)
    return result | {"assignment": plain.assignment}


def cluster_shares(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Percent of the pixels in each cluster, the largest first."""
    pixels = np.concatenate([prediction.cluster.numpy().ravel() for prediction in predictions] or [[]])
    clusters, counts = np.unique(pixels.astype(int), return_counts=True)
    order = np.argsort(-counts)
    return {str(clusters[k]): float(100 * counts[k] / counts.sum()) for k in order}


def class_maps(prediction: Prediction, labels: LabelSpace, plain: Evaluation) -> dict[str, np.ndarray]:
    """Title -> class ids (H, W) of one image, `IGNORE` for none: truth, clusters, linear probe.

    Without labels, clusters cannot be matched: the first n_classes take the class ids in order.
    """
    clusters, maps = prediction.cluster.numpy(), {}  # (H, W)
    if plain.assignment is not None:
        maps["truth"] = prediction.label.numpy()
        clusters = np.array(plain.assignment)[clusters]  # (H, W), -1 if unmatched
    maps["clusters"] = clusters
    if prediction.linear is not None:
        maps["linear probe"] = prediction.linear.numpy()
    return {
        title: np.where((ids >= 0) & (ids < labels.n_classes), ids, IGNORE) for title, ids in maps.items()
    }


@contextmanager
def errors_as_warnings(what: Path | str) -> Iterator[None]:
    """Reports errors of optional files and of wandb as one-line warnings."""
    try:
        yield
    except Exception as error:  # of matplotlib, Pillow, wandb and the disk
        print(f"{what}: {type(error).__name__}: {first_line(error)}; the run continues without it")


def write_pictures(
    folder: Path,
    labels: LabelSpace,
    *,
    predictions: Sequence[Prediction],
    plain: Evaluation,
    refined: Evaluation | None,
) -> None:
    """Writes confusion.npz, confusion.png and class_iou.png of the scores, and predictions.png."""
    if plain.assignment is None:
        labels = LabelSpace(tuple(f"cluster {k}" for k in range(labels.n_classes)), labels.palette)
    rows = []
    for prediction in predictions:
        row = {"image": prediction.image.permute(1, 2, 0).numpy()}  # (H, W, 3)
        for title, ids in class_maps(prediction, labels, plain).items():
            row[title] = colour(ids, labels, missing=UNMATCHED if title == "clusters" else IGNORED)
        rows.append(row)
    counts, stored, iou = {head: scores.confusion for head, scores in plain.scores.items()}, {}, {}
    for suffix, stage, found in (("", "before", plain), ("_crf", "after", refined)):
        if found is not None:
            stored |= {f"{head}{suffix}": scores.confusion for head, scores in found.scores.items()}
            each = class_iou(found, labels.names)
            iou |= {f"{head}, {stage} CRF": values for head, values in each.items()}
    if stored:
        with replacing(folder / "confusion.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, class_names=np.array(labels.names), **stored)
    figures = {"confusion": (draw_confusion, counts), "class_iou": (draw_class_iou, iou)}
    for name, (draw, content) in (figures | {"predictions": (draw_predictions, rows)}).items():
        if content:
            with errors_as_warnings(path := folder / f"{name}.png"):
                draw(path, content, labels=labels)
