"""Pictures of an evaluation: predictions in the data set's palette, and confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle

from utils.vision.labels import IGNORE, LabelSpace

IGNORED = (0, 0, 0)
UNMATCHED = (160, 160, 160)
LEGEND_ROWS = 16  # before another column begins
LONGEST_GRID = 4  # images in a column of predictions.png; more stand in two
LEGEND_INCHES = 1.45  # that a class name is given
TIGHT = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
MOST_BESIDE = 15  # classes, up to which confusions stand side by side


def colour(classes: np.ndarray, labels: LabelSpace, *, missing: tuple[int, int, int] = IGNORED) -> np.ndarray:
    """(H, W) class ids, 255 = missing, to (H, W, 3) uint8."""
    table = np.array([*labels.palette, missing], dtype=np.uint8)
    return table[np.where(classes == IGNORE, labels.n_classes, classes)]


def draw_predictions(path: Path, rows: Sequence[dict[str, np.ndarray]], *, labels: LabelSpace) -> None:
    """One row an image, one column for each picture (H, W, 3) uint8 under its title, and a legend.

    Many images take two such blocks of columns side by side.

    Args:
        path: PNG to write.
        rows: title -> picture, the same titles in each row.
        labels: classes for the legend.
    """
    titles = list(rows[0])
    blocks = 2 if len(rows) > LONGEST_GRID else 1
    lines, gap = -(-len(rows) // blocks), 0.12
    widths = ([1.0] * len(titles) + [gap]) * blocks
    legend = _class_handles(labels)
    columns = max(1, min(len(legend), int(2 * sum(widths) / LEGEND_INCHES)))
    below = 0.2 + 0.21 * -(-len(legend) // columns)  # inches
    figure = plt.figure(figsize=(2 * sum(widths[:-1]), 2 * lines + 0.25 + below))
    height = figure.get_figheight()
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
        handles=legend, loc="lower center", ncol=columns, fontsize=9, frameon=False, handlelength=1.2
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _class_handles(labels: LabelSpace) -> list[Patch]:
    """Entries of a legend: the classes, and what has none; outlined, as some are nearly white."""
    named = [*zip(labels.names, labels.palette, strict=True), ("ignored", IGNORED), ("unmatched", UNMATCHED)]
    return [Patch(facecolor=np.array(c) / 255, edgecolor="0.5", linewidth=0.5, label=n) for n, c in named]


def draw_sweep(path: Path, rows: Sequence[tuple[str, dict[str, float]]]) -> None:
    """The metrics of every setting: a dot a run, a bar of one standard deviation about the mean.

    Args:
        path: PNG to write.
        rows: (setting, metric name -> percent) for each run.
    """
    names = list(dict.fromkeys(name for _, metrics in rows for name in metrics))
    settings = list(dict.fromkeys(setting for setting, _ in rows))
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(1.5 + 2.2 * len(names), 1.2 + 0.3 * len(settings)),
        sharey=True,
        squeeze=False,
    )
    for axis, name in zip(axes[0], names, strict=True):
        values = [metrics.get(name, np.nan) for _, metrics in rows]
        labels = [setting for setting, _ in rows]
        seaborn.stripplot(x=values, y=labels, ax=axis, color="0.6", size=4, jitter=False)
        seaborn.pointplot(
            x=values,
            y=labels,
            ax=axis,
            errorbar="sd",
            linestyle="none",
            marker="|",
            markersize=9,
            err_kws={"linewidth": 1.5},
        )
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel("%", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", linewidth=0.4)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_sets(path: Path, rows: Sequence[dict[str, float]], *, title: str) -> None:
    """What each step of propagation does to the sets, against labels.

    Args:
        path: PNG to write.
        rows: for t = 0..T, `precision`, `recall`, `purity`, `chance`, `positives`, `negatives`, `ambiguous`.
        title: above the figure.
    """
    steps = list(range(len(rows)))
    figure, (quality, size) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for key, name in (
        ("purity", "purity of negatives"),
        ("precision", "precision of positives"),
        ("recall", "recall of positives"),
    ):
        seaborn.lineplot(x=steps, y=[row[key] for row in rows], ax=quality, marker="o", label=name)
    quality.set(xlabel="relocations t", ylabel="%", ylim=(0, 101), xticks=steps)
    shares = [[row[key] for row in rows] for key in ("positives", "ambiguous", "negatives")]
    size.stackplot(
        steps,
        shares,
        labels=("positives", "ambiguous zone", "negatives"),
        colors=("#4c9f70", "0.8", "#c0504d"),
    )
    size.set(xlabel="relocations t", ylabel="% of the patches", ylim=(0, 100), xticks=steps)
    for axis in (quality, size):
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)  # hides no curve
        axis.set_title(title if axis is quality else "", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_confusion(path: Path, confusions: dict[str, np.ndarray], *, labels: LabelSpace) -> None:
    """Heat maps of (C, C + 1) confusions in percent of the truth; those of many classes one below another.

    Args:
        path: PNG to write.
        confusions: title -> counts; the last column holds unmatched clusters and is shown if it counts.
        labels: row and column names.
    """
    side = 2.4 + 0.42 * labels.n_classes  # inches
    stacked = labels.n_classes > MOST_BESIDE
    shape = (len(confusions), 1) if stacked else (1, len(confusions))
    figure, axes = plt.subplots(
        *shape, figsize=(side * shape[1], side * shape[0]), squeeze=False, layout=TIGHT
    )
    for axis, (title, counts) in zip(axes.flat, confusions.items(), strict=True):
        _draw_heat_map(axis, counts, labels=labels)
        axis.set_title(f"{title}: % of the true class", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_heat_map(axis: Axes, counts: np.ndarray, *, labels: LabelSpace) -> None:
    columns = [*labels.names, "unmatched"]
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], columns[:-1]
    total = counts.sum(axis=1, keepdims=True)  # (C, 1)
    share = 100 * counts / np.maximum(total, 1)  # (C, columns)
    seaborn.heatmap(
        share,
        ax=axis,
        vmin=0,
        vmax=100,
        cmap="Blues",
        square=True,
        cbar=False,
        linewidths=0.4,
        linecolor="0.9",
        annot=np.where(share >= 0.5, np.char.mod("%.0f", share), ""),  # what would round to 0 only clutters
        fmt="",
        annot_kws={"fontsize": 8},
        mask=np.broadcast_to(total == 0, share.shape),
        xticklabels=columns,
        yticklabels=[
            n if pixels else f"{n} (no pixel)" for n, pixels in zip(labels.names, total, strict=True)
        ],
    )
    axis.set_xlabel("predicted", fontsize=10)
    axis.set_ylabel("true", fontsize=10)
    axis.tick_params(axis="x", labelsize=9, rotation=90)
    axis.tick_params(axis="y", labelsize=9, rotation=0)


def draw_class_iou(path: Path, iou: dict[str, dict[str, float]], *, labels: LabelSpace) -> None:
    """Bars of IoU per class in the palette, one panel each.

    Args:
        path: PNG to write.
        iou: title -> class name -> percent; a class with an empty union (NaN) has no bar.
        labels: colours, and the order from top to bottom.
    """
    height = 0.9 + 0.27 * labels.n_classes  # inches
    figure, axes = plt.subplots(
        1, len(iou), figsize=(1.6 + 3.6 * len(iou), height), sharey=True, squeeze=False, layout=TIGHT
    )
    for axis, (title, values) in zip(axes[0], iou.items(), strict=True):
        percent = np.array([values[name] for name in labels.names])  # (C,)
        mean = np.nanmean(percent) if np.isfinite(percent).any() else np.nan
        colours = np.array(labels.palette) / 255
        axis.barh(labels.names, np.nan_to_num(percent), color=colours, edgecolor="0.4", linewidth=0.5)
        axis.axvline(mean, color="0.6", linestyle="dashed", linewidth=1, zorder=0)
        for place, value in enumerate(percent):
            shown = "no pixel" if np.isnan(value) else f"{value:.1f}"
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axis.text(np.nan_to_num(value) + 1.2, place, shown, va="center", fontsize=8.5, bbox=behind)
        axis.set_title(f"{title}, mean {mean:.1f} %", fontsize=10)
        axis.set(xlim=(0, 112), xticks=range(0, 101, 25))
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylim(labels.n_classes - 0.4, -0.6)  # the first class on top
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_legend(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Colour, id, name and share of the pixels of each id of a mask, in as many columns as it takes.

    Args:
        path: PNG to write.
        rows: `id`, `name`, `colour` and `share` in percent.
    """
    columns = -(-len(rows) // LEGEND_ROWS)
    deep = -(-len(rows) // columns)
    wide = 1.1 + 0.08 * max(len(row["name"]) for row in rows) + 0.55  # inches
    figure = plt.figure(figsize=(wide * columns, 0.27 * deep + 0.1))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, wide * columns), ylim=(deep + 0.2, -0.2))
    axis.set_axis_off()
    for place, row in enumerate(rows):
        left, top = wide * (place // deep), place % deep
        swatch = np.array(row["colour"]) / 255
        axis.add_patch(Rectangle((left + 0.1, top + 0.1), 0.4, 0.8, facecolor=swatch, edgecolor="0.3"))
        axis.text(left + 0.85, top + 0.5, row["id"], fontsize=9, ha="right", va="center", color="0.4")
        ink = "black" if row["share"] else "0.6"  # what no pixel shows stands back
        axis.text(left + 0.95, top + 0.5, row["name"], fontsize=9, va="center", color=ink, parse_math=False)
        share = f"{row['share']:.1f}%"
        axis.text(left + wide - 0.1, top + 0.5, share, fontsize=9, ha="right", va="center", color=ink)
    figure.savefig(path, dpi=150)
    plt.close(figure)
