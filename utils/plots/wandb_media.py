"""What wandb shows of a validation: tables, masks and bars."""

from __future__ import annotations

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
    """A row an image: its name, the photograph, and the photograph under each of its class maps.

    Args:
        names: P of them.
        photographs: (P, H, W, 3) uint8.
        maps: P times title -> classes (H, W), 255 = none; the same titles each time.
        labels: class names.
    """
    words = dict(enumerate(labels.names)) | {IGNORE: "none"}
    titles = list(maps[0]) if maps else []
    table = wandb.Table(columns=["image", "photograph", *titles])
    for name, photograph, found in zip(names, photographs, maps, strict=True):
        overlays = [
            wandb.Image(photograph, file_type="jpg", masks={title: _mask(found[title], words)})
            for title in titles
        ]
        table.add_data(name, wandb.Image(photograph, file_type="jpg"), *overlays)
    return table


def _mask(classes: np.ndarray, words: dict[int, str]) -> dict[str, object]:
    return {"mask_data": classes.astype(np.uint8), "class_labels": words}


def confusion_table(counts: np.ndarray, labels: LabelSpace) -> wandb.Table:
    """Counts (C, C + 1) as a row a true class, in percent of it; the last column is of unmatched clusters."""
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (C, C + 1)
    rows = [[name, *row] for name, row in zip(labels.names, share.round(2).tolist(), strict=True)]
    columns = [f"predicted {name}" for name in labels.names]  # no two alike, whatever classes are called
    return wandb.Table(columns=["true class", *columns, "unmatched"], data=rows)


def iou_chart(iou: Mapping[str, float], *, title: str) -> object:
    """Bars of IoU per class in percent; a class with an empty union has none."""
    rows = [[name, value] for name, value in iou.items() if math.isfinite(value)]
    return wandb.plot.bar(wandb.Table(columns=["class", "IoU"], data=rows), "class", "IoU", title=title)
