"""Figures of an evaluation: predictions, confusion matrices, IoU per class, sweeps, sets and legends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle

from utils.vision.labels import LabelSpace

IGNORED = (0, 0, 0)
UNMATCHED = (160, 160, 160)
LEGEND_ROWS = 16  # per column of a legend
MAX_SINGLE_BLOCK = 4  # images; more are drawn in two blocks side by side
LEGEND_INCHES = 1.45  # width of a class name
MAX_SIDE_BY_SIDE = 15  # classes; with more, confusion matrices are stacked
LAYOUT = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches


def colour(classes: np.ndarray, labels: LabelSpace, *, missing: tuple[int, int, int] = IGNORED) -> np.ndarray:
    """Maps class ids (H, W) to colours (H, W, 3) uint8; ids above the classes, such as 255, get `missing`."""
    table = np.array([*labels.palette, missing], dtype=np.uint8)
    return table[np.where(classes < labels.n_classes, classes, labels.n_classes)]  # (H, W, 3)


def draw_predictions(path: Path, rows: Sequence[dict[str, np.ndarray]], *, labels: LabelSpace) -> None:
    """Draws one row per image with its pictures side by side, and a legend of the classes.

    Args:
        path: PNG to write.
        rows: title -> picture (H, W, 3) uint8, with the same titles in each row.
        labels: classes of the legend.
    """
    titles = list(rows[0])
    blocks = 2 if len(rows) > MAX_SINGLE_BLOCK else 1
    lines, gap = math.ceil(len(rows) / blocks), 0.12
    widths = ([1.0] * len(titles) + [gap]) * blocks
    handles = _class_handles(labels)
    columns = max(1, min(len(handles), int(2 * sum(widths) / LEGEND_INCHES)))
    below = 0.2 + 0.21 * math.ceil(len(handles) / columns)  # inches
    height = 2 * lines + 0.25 + below
    figure = plt.figure(figsize=(2 * sum(widths[:-1]), height))
    grid = figure.add_gridspec(
        lines, len(widths) - 1, width_ratios=widths[:-1], wspace=0.03, hspace=0.03,
        left=0.005, right=0.995, top=1 - 0.25 / height, bottom=below / height,
    )  # fmt: skip
    for number, pictures in enumerate(rows):
        block, line = divmod(number, lines)
        for place, title in enumerate(titles):
            axis = figure.add_subplot(grid[line, block * (len(titles) + 1) + place])
            axis.imshow(pictures[title])
            axis.set_axis_off()
            if line == 0:
                axis.set_title(title, fontsize=10, pad=3)
    figure.legend(
        handles=handles, loc="lower center", ncol=columns, fontsize=9, frameon=False, handlelength=1.2
    )
    _save(figure, path, dpi=120)


def _class_handles(labels: LabelSpace) -> list[Patch]:
    """Legend entries, outlined because some colours are nearly white."""
    named = [*zip(labels.names, labels.palette, strict=True), ("ignored", IGNORED), ("unmatched", UNMATCHED)]
    return [Patch(facecolor=np.array(c) / 255, edgecolor="0.5", linewidth=0.5, label=n) for n, c in named]


def _save(figure: Figure, path: Path, *, dpi: int) -> None:
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def draw_sweep(path: Path, rows: Sequence[tuple[str, dict[str, float]]]) -> None:
    """Draws the metrics of every setting: a dot per run, and mean and standard deviation as a bar.

    Args:
        path: PNG to write.
        rows: (setting, metric name -> percent) for each run.
    """
    names = list(dict.fromkeys(name for _, metrics in rows for name in metrics))
    settings = [setting for setting, _ in rows]
    size = (1.5 + 2.2 * len(names), 1.2 + 0.3 * len(set(settings)))  # inches
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        values = [metrics.get(name, np.nan) for _, metrics in rows]
        seaborn.stripplot(x=values, y=settings, ax=axis, color="0.6", size=4, jitter=False)
        seaborn.pointplot(
            x=values, y=settings, ax=axis, errorbar="sd", linestyle="none", marker="|", markersize=9,
            err_kws={"linewidth": 1.5},
        )  # fmt: skip
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel("%", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", linewidth=0.4)
    figure.tight_layout()
    _save(figure, path, dpi=120)


def draw_sets(path: Path, rows: Sequence[dict[str, float]], *, title: str) -> None:
    """Draws the quality and the size of the sets after each relocation, measured with labels.

    Args:
        path: PNG to write.
        rows: for t = 0..T, `precision`, `recall`, `purity`, `positives`, `ambiguous` and `negatives`.
        title: shown above the figure.
    """
    steps = list(range(len(rows)))
    figure, (quality, size) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    curves = {"purity": "negatives", "precision": "positives", "recall": "positives"}
    for key, members in curves.items():
        values = [row[key] for row in rows]
        seaborn.lineplot(x=steps, y=values, ax=quality, marker="o", label=f"{key} of {members}")
    quality.set(xlabel="relocations t", ylabel="%", ylim=(0, 101), xticks=steps)
    quality.set_title(title, fontsize=9)
    shares = [[row[key] for row in rows] for key in ("positives", "ambiguous", "negatives")]
    names = ("positives", "ambiguous zone", "negatives")
    size.stackplot(steps, shares, labels=names, colors=("#4c9f70", "0.8", "#c0504d"))
    size.set(xlabel="relocations t", ylabel="% of the patches", ylim=(0, 100), xticks=steps)
    for axis in (quality, size):
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)  # below the axes
    _save(figure, path, dpi=120)


def draw_confusion(path: Path, confusions: dict[str, np.ndarray], *, labels: LabelSpace) -> None:
    """Draws confusion matrices as heat maps in percent of the true class.

    Args:
        path: PNG to write.
        confusions: title -> counts (C, C + 1); the last column, unmatched clusters, is hidden if empty.
        labels: row and column names.
    """
    side = 2.4 + 0.42 * labels.n_classes  # inches
    stacked = labels.n_classes > MAX_SIDE_BY_SIDE
    rows, columns = (len(confusions), 1) if stacked else (1, len(confusions))
    figure, axes = plt.subplots(
        rows, columns, figsize=(side * columns, side * rows), squeeze=False, layout=LAYOUT
    )
    for axis, (title, counts) in zip(axes.flat, confusions.items(), strict=True):
        _draw_heat_map(axis, counts, labels=labels)
        axis.set_title(f"{title}: % of the true class", fontsize=11)
    _save(figure, path, dpi=110)


def _draw_heat_map(axis: Axes, counts: np.ndarray, *, labels: LabelSpace) -> None:
    columns = [*labels.names, "unmatched"]
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], columns[:-1]
    total = counts.sum(axis=1, keepdims=True)  # (C, 1)
    share = 100 * counts / np.maximum(total, 1)  # (C, columns)
    cells = np.where(share >= 0.5, np.char.mod("%.0f", share), "")  # zeros would only add clutter
    rows = [name if n else f"{name} (no pixel)" for name, n in zip(labels.names, total, strict=True)]
    seaborn.heatmap(
        share, ax=axis, vmin=0, vmax=100, cmap="Blues", square=True, cbar=False, linewidths=0.4,
        linecolor="0.9", annot=cells, fmt="", annot_kws={"fontsize": 8},
        mask=np.broadcast_to(total == 0, share.shape), xticklabels=columns, yticklabels=rows,
    )  # fmt: skip
    axis.set_xlabel("predicted", fontsize=10)
    axis.set_ylabel("true", fontsize=10)
    axis.tick_params(axis="x", labelsize=9, rotation=90)
    axis.tick_params(axis="y", labelsize=9, rotation=0)


def draw_class_iou(path: Path, iou: dict[str, dict[str, float]], *, labels: LabelSpace) -> None:
    """Draws bars of IoU per class in the palette, one panel per title.

    Args:
        path: PNG to write.
        iou: title -> class name -> percent; a class with an empty union (NaN) has no bar.
        labels: colours, and the order from top to bottom.
    """
    size = (1.6 + 3.6 * len(iou), 0.9 + 0.27 * labels.n_classes)  # inches
    figure, axes = plt.subplots(1, len(iou), figsize=size, sharey=True, squeeze=False, layout=LAYOUT)
    colours = np.array(labels.palette) / 255  # (C, 3)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    for axis, (title, values) in zip(axes[0], iou.items(), strict=True):
        percent = np.array([values[name] for name in labels.names])  # (C,)
        mean = np.nanmean(percent) if np.isfinite(percent).any() else np.nan
        axis.barh(labels.names, np.nan_to_num(percent), color=colours, edgecolor="0.4", linewidth=0.5)
        axis.axvline(mean, color="0.6", linestyle="dashed", linewidth=1, zorder=0)
        for place, value in enumerate(percent):
            shown = "no pixel" if np.isnan(value) else f"{value:.1f}"
            axis.text(np.nan_to_num(value) + 1.2, place, shown, va="center", fontsize=8.5, bbox=behind)
        axis.set_title(f"{title}, mean {mean:.1f} %", fontsize=10)
        axis.set(xlim=(0, 112), xticks=range(0, 101, 25))
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylim(labels.n_classes - 0.4, -0.6)  # first class on top
    _save(figure, path, dpi=110)


def draw_legend(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the colour, id, name and share of the pixels of each id of a mask, in columns.

    Args:
        path: PNG to write.
        rows: `id`, `name`, `colour` and `share` in percent.
    """
    columns = math.ceil(len(rows) / LEGEND_ROWS)
    lines = math.ceil(len(rows) / columns)
    width = 1.65 + 0.08 * max(len(row["name"]) for row in rows)  # inches per column
    figure = plt.figure(figsize=(width * columns, 0.27 * lines + 0.1))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width * columns), ylim=(lines + 0.2, -0.2))
    axis.set_axis_off()
    for place, row in enumerate(rows):
        left, top = width * (place // lines), place % lines
        swatch = np.array(row["colour"]) / 255
        axis.add_patch(Rectangle((left + 0.1, top + 0.1), 0.4, 0.8, facecolor=swatch, edgecolor="0.3"))
        middle = {"y": top + 0.5, "va": "center", "fontsize": 9}
        ink = "black" if row["share"] else "0.6"  # absent classes are grey
        axis.text(left + 0.85, s=row["id"], ha="right", color="0.4", **middle)
        axis.text(left + 0.95, s=row["name"], color=ink, parse_math=False, **middle)
        axis.text(left + width - 0.1, s=f"{row['share']:.1f}%", ha="right", color=ink, **middle)
    _save(figure, path, dpi=150)
