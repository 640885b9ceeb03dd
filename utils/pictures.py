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
from matplotlib.patches import Patch, Rectangle

from utils.labels import LabelSpace

IGNORED = (0, 0, 0)
UNMATCHED = (160, 160, 160)
LEGEND_ROWS = 16  # before another column begins


def colour(classes: np.ndarray, labels: LabelSpace, *, missing: tuple[int, int, int] = IGNORED) -> np.ndarray:
    """(H, W) class ids, negative = missing, to (H, W, 3) uint8."""
    table = np.array([*labels.palette, missing], dtype=np.uint8)
    return table[np.where(classes < 0, labels.n_classes, classes)]


def draw_predictions(path: Path, rows: Sequence[dict[str, np.ndarray]], *, labels: LabelSpace) -> None:
    """One row an image, one column for each picture (H, W, 3) uint8 under its title, and a legend.

    Args:
        path: PNG to write.
        rows: title -> picture, the same titles in each row.
        labels: classes for the legend.
    """
    titles = list(rows[0])
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(2 * len(titles), 2 * len(rows) + 0.6), squeeze=False
    )
    for row, pictures in zip(axes, rows, strict=True):
        for axis, title in zip(row, titles, strict=True):
            axis.imshow(pictures[title])
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    handles = [
        Patch(color=np.array(c) / 255, label=n) for n, c in zip(labels.names, labels.palette, strict=True)
    ]
    handles += [Patch(color=np.array(IGNORED) / 255, label="ignored")]
    figure.legend(
        handles=handles, loc="lower center", ncol=min(8, 2 * len(titles)), fontsize=7, frameon=False
    )
    lines = -(-len(handles) // min(8, 2 * len(titles)))
    figure.tight_layout(rect=(0, 0.02 + 0.22 * lines / figure.get_figheight(), 1, 1), pad=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    figure, (quality, size) = plt.subplots(1, 2, figsize=(8.4, 3.2))
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
        axis.legend(fontsize=8, loc="center right")
        axis.set_title(title if axis is quality else "", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_confusion(path: Path, confusions: dict[str, np.ndarray], *, labels: LabelSpace) -> None:
    """Heat maps of (C, C + 1) confusions side by side, rows normalised by truth, in percent.

    Args:
        path: PNG to write.
        confusions: title -> counts; the last column holds unmatched clusters and is shown if it counts.
        labels: row and column names.
    """
    side = 2.2 + 0.42 * labels.n_classes
    figure, axes = plt.subplots(1, len(confusions), figsize=(side * len(confusions), side), squeeze=False)
    for axis, (title, counts) in zip(axes[0], confusions.items(), strict=True):
        columns = [*labels.names, "unmatched"]
        if not counts[:, -1].any():
            counts, columns = counts[:, :-1], columns[:-1]
        total = counts.sum(axis=1, keepdims=True)
        share = 100 * counts / np.maximum(total, 1)
        seaborn.heatmap(
            share,
            ax=axis,
            vmin=0,
            vmax=100,
            cmap="mako_r",
            square=True,
            cbar=False,
            annot=labels.n_classes <= 15,
            fmt=".0f",
            annot_kws={"fontsize": 7},
            xticklabels=columns,
            yticklabels=labels.names,
        )
        axis.set_title(f"{title} (% of the true class)", fontsize=9)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
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
