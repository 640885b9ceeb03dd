"""Figures of an evaluation: predictions, confusion matrices, IoU per class, sweeps, sets and legends."""

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
from matplotlib.patches import Patch
from PIL import Image

from utils.files import replacing
from utils.vision.labels import LabelSpace

IGNORED = (0, 0, 0)
UNMATCHED = (160, 160, 160)
LEGEND_ROWS = 16  # per column of a legend
MOST_NUMBERED = 60  # classes of a confusion matrix whose cells have room for a number
SETS = ("positives", "ambiguous", "negatives")
SET_COLOURS = ("#0072b2", "#f0e442", "#d55e00")  # colour-blind safe (Okabe and Ito)
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 3, "fontsize": 9, "frameon": False}


def colour(classes: np.ndarray, labels: LabelSpace, *, missing: tuple[int, int, int] = IGNORED) -> np.ndarray:
    """Maps class ids (H, W) to colours (H, W, 3) uint8; ids above the classes, such as 255, get `missing`."""
    table = np.array([*labels.palette, missing], dtype=np.uint8)
    return table[np.where(classes < labels.n_classes, classes, labels.n_classes)]  # (H, W, 3)


def draw_predictions(path: Path, rows: Sequence[dict[str, np.ndarray]], *, labels: LabelSpace) -> None:
    """Draws the pictures of each image, title -> (H, W, 3) uint8, side by side, and a legend."""
    blocks = 2 if len(rows) > 4 else 1
    lines, columns = math.ceil(len(rows) / blocks), len(rows[0])
    named = [*zip(labels.names, labels.palette, strict=True)]
    named += [("ignored", IGNORED), ("unmatched", UNMATCHED)] if "truth" in rows[0] else []
    width = 2 * columns * blocks  # inches
    ncols = max(1, int(width / 1.45))  # of the legend
    size = (width, 2.05 * lines + max(1, 0.4 + 0.2 * math.ceil(len(named) / ncols)))
    figure, axes = plt.subplots(lines, columns * blocks, figsize=size, squeeze=False, layout="compressed")
    for axis in axes.flat:
        axis.set_axis_off()
    for number, pictures in enumerate(rows):
        line, block = divmod(number, blocks)
        for axis, (title, picture) in zip(axes[line, block * columns :], pictures.items(), strict=False):
            axis.imshow(picture)
            if line == 0:
                axis.set_title(title, fontsize=10)
    _legend(figure, named, loc="outside lower center", ncols=ncols)
    save_figure(figure, path)


def _legend(figure: Figure, named: Sequence[tuple[str, tuple[int, ...]]], **place: Any) -> None:
    """A legend of (name, colour), outlined because some colours are nearly white."""
    handles = [Patch(facecolor=np.array(c) / 255, edgecolor="0.5", linewidth=0.5, label=n) for n, c in named]
    figure.legend(handles=handles, fontsize=9, frameon=False, handlelength=1.2, **place)


def draw_legend(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the `id`, `name` and `share` in percent of each id of a mask, in its `colour`."""
    named = [(f"{row['id']:3}  {row['name']}  {row['share']:.1f}%", row["colour"]) for row in rows]
    figure = plt.figure()
    _legend(figure, named, loc="center", ncols=math.ceil(len(rows) / LEGEND_ROWS))
    save_figure(figure, path, dpi=150)


def save_figure(figure: Figure, path: Path, *, dpi: int = 120, bbox_inches: str | None = "tight") -> None:
    """Writes a PNG atomically and closes the figure."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches=bbox_inches)
    plt.close(figure)


def write_strip(path: Path, pictures: Sequence[np.ndarray]) -> None:
    """Writes pictures (H, W, 3) uint8 of one size side by side, 160 pixels wide each."""
    small = [Image.fromarray(picture).resize((160, 160), Image.Resampling.NEAREST) for picture in pictures]
    with replacing(path) as temporary:
        Image.fromarray(np.concatenate(small, axis=1)).save(temporary, format="PNG")


def draw_sweep(path: Path, rows: Sequence[tuple[str, dict[str, float]]]) -> None:
    """Draws a dot per run, and mean and standard deviation per setting, from (setting, metric -> percent)."""
    names = list(dict.fromkeys(name for _, metrics in rows for name in metrics))
    settings = [setting for setting, _ in rows]
    size = (1.5 + 2.2 * len(names), 1.2 + 0.3 * len(set(settings)))  # inches
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False, layout="tight")
    for axis, name in zip(axes[0], names, strict=True):
        values = [metrics.get(name, np.nan) for _, metrics in rows]
        shared = {"x": values, "y": settings, "ax": axis}
        seaborn.stripplot(**shared, color="0.6", size=4, jitter=False)
        seaborn.pointplot(
            **shared, errorbar="sd", linestyle="none", marker="|", markersize=9, err_kws={"linewidth": 1.5}
        )
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel("%", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", linewidth=0.4)
    save_figure(figure, path)


def draw_sets(path: Path, rows: Sequence[dict[str, float]], *, title: str) -> None:
    """Draws the quality and the size of the sets after t = 0..T relocations, in percent.

    Each row has the keys `precision`, `recall`, `purity`, `positives`, `ambiguous` and `negatives`.
    """
    figure, (quality, size) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for key, members in (("purity", "negatives"), ("precision", "positives"), ("recall", "positives")):
        quality.plot([row[key] for row in rows], marker="o", label=f"{key} of {members}")
    quality.set(xlabel="relocations t", ylabel="%", ylim=(0, 101), xticks=range(len(rows)), title=title)
    quality.legend(**BELOW)
    draw_shares(size, rows)
    save_figure(figure, path)


def draw_shares(axis: Axes, rows: Sequence[dict[str, float]]) -> None:
    """Draws a bar with the percentages of `SETS` for each t = 0..T."""
    steps = [str(t) for t in range(len(rows))]
    left = np.zeros(len(rows))
    for name, colour in zip(SETS, SET_COLOURS, strict=True):
        share = np.array([row[name] for row in rows])
        bars = axis.barh(steps, share, left=left, color=colour, alpha=0.8, label=name)
        axis.bar_label(bars, [f"{value:.1f}" if value >= 6 else "" for value in share], label_type="center")
        left += share
    axis.invert_yaxis()
    axis.legend(**BELOW)
    axis.set(xlabel="% of the patches of a batch", ylabel="relocations t", xlim=(0, 100))


def draw_confusion(path: Path, confusions: dict[str, np.ndarray], *, labels: LabelSpace) -> None:
    """Draws confusion matrices, title -> counts (C, C + 1), as heat maps in percent of the true class.

    The last column, unmatched clusters, is hidden if it is empty. Many classes get no numbers.
    """
    numbered = labels.n_classes <= MOST_NUMBERED
    side = 2.4 + (0.42 if numbered else 0.16) * labels.n_classes  # inches
    size = (side * len(confusions), side)
    figure, axes = plt.subplots(1, len(confusions), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, counts) in zip(axes.flat, confusions.items(), strict=True):
        columns = [*labels.names, "unmatched"] if counts[:, -1].any() else labels.names
        total = counts.sum(axis=1, keepdims=True)  # (C, 1)
        share = 100 * counts[:, : len(columns)] / np.maximum(total, 1)  # (C, columns)
        cells = np.where(share >= 0.5, np.char.mod("%.0f", share), "")  # zeros would only add clutter
        seaborn.heatmap(
            share, ax=axis, vmin=0, vmax=100, cmap="Blues", square=True, cbar=False, linewidths=0.4,
            linecolor="0.9", annot=cells if numbered else None, fmt="", annot_kws={"fontsize": 8},
            xticklabels=columns, yticklabels=labels.names,
        )  # fmt: skip
        axis.tick_params(axis="x", rotation=90)
        axis.tick_params(axis="y", rotation=0)
        axis.set(xlabel="predicted", ylabel="true", title=f"{title}: % of the true class")
    save_figure(figure, path)


def draw_class_iou(path: Path, iou: dict[str, dict[str, float]], *, labels: LabelSpace) -> None:
    """Draws bars of IoU per class in the palette, one panel for each title -> class name -> percent.

    A class with an empty union (NaN) has no bar.
    """
    size = (1.6 + 3.6 * len(iou), 0.9 + 0.27 * labels.n_classes)  # inches
    figure, axes = plt.subplots(1, len(iou), figsize=size, sharey=True, squeeze=False, layout="constrained")
    colours = np.array(labels.palette) / 255  # (C, 3)
    for axis, (title, values) in zip(axes[0], iou.items(), strict=True):
        percent = np.array([values[name] for name in labels.names])  # (C,)
        mean = np.nanmean(percent)
        bars = axis.barh(labels.names, np.nan_to_num(percent), color=colours, edgecolor="0.4", linewidth=0.5)
        shown = ["no pixel" if np.isnan(value) else f"{value:.1f}" for value in percent]
        axis.bar_label(bars, shown, padding=3, fontsize=8.5)
        axis.axvline(mean, color="0.6", linestyle="dashed", linewidth=1, zorder=0)
        axis.set_title(f"{title}, mean {mean:.1f} %", fontsize=10)
        axis.set(xlim=(0, 112), xticks=range(0, 101, 25))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylim(labels.n_classes - 0.4, -0.6)  # first class on top
    save_figure(figure, path)
