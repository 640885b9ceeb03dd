"""Tables, masks and bar charts of a validation for wandb."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import wandb

from utils.vision.labels import IGNORE, LabelSpace


def prediction_table(
    names: Sequence[str],
    photographs: np.ndarray,
    *,
    maps: Sequence[Mapping[str, np.ndarray]],
    labels: LabelSpace,
) -> wandb.Table:
    """One row per image: its name, the photograph (H, W, 3) uint8, and each class map over the photograph.

    `maps` holds for each image title -> class ids (H, W), 255 = none, with the same titles for all.
    """
    class_labels = dict(enumerate(labels.names)) | {IGNORE: "none"}
    titles = list(maps[0]) if maps else []
    table = wandb.Table(columns=["image", "photograph", *titles])
    for name, photograph, class_maps in zip(names, photographs, maps, strict=True):
        row = [wandb.Image(photograph, file_type="jpg")]
        for title in titles:
            masks = {"mask_data": class_maps[title].astype(np.uint8), "class_labels": class_labels}
            row.append(wandb.Image(photograph, file_type="jpg", masks={title: masks}))
        table.add_data(name, *row)
    return table


def confusion_table(counts: np.ndarray, labels: LabelSpace) -> wandb.Table:
    """A confusion matrix (C, C + 1) in percent of the true class; the last column is unmatched clusters."""
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (C, C + 1)
    rows = [[name, *row] for name, row in zip(labels.names, share.round(2).tolist(), strict=True)]
    columns = [f"predicted {name}" for name in labels.names]  # the prefix keeps column names unique
    return wandb.Table(columns=["true class", *columns, "unmatched"], data=rows)


def iou_chart(iou: Mapping[str, float], *, title: str) -> object:
    """A bar chart of IoU per class in percent; a class with an empty union (NaN) has no bar."""
    rows = [[name, value] for name, value in iou.items() if math.isfinite(value)]
    return wandb.plot.bar(wandb.Table(columns=["class", "IoU"], data=rows), "class", "IoU", title=title)
