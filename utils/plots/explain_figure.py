"""A picture of what propagation does for one anchor: similarity maps, sets and histograms for t = 0..T."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL import Image

from utils.plots.explanation import ITSELF, ZONES, Explanation

COLOURS = ("#0072b2", "#f0e442", "#d55e00")  # of ZONES, told apart by the colour-blind (Okabe and Ito)
LABELS = (
    r"positives: $v_t \cdot f_j > \Phi_t$",
    "ambiguous zone: left out",
    r"negatives: $v_t \cdot f_j < \Psi_t$",
)
OPACITY = 0.55  # of a set over its photograph
DPI = 105
WIDTH = 13.4  # inches, of all columns together
HEAD = 1.15  # inches, of title, caption and legend
BINS = 60


def draw_explanation(
    path: Path,
    found: Explanation,
    *,
    pictures: np.ndarray,
    names: Sequence[str],
    about: str,
    neighbours: int = 3,
) -> None:
    """A column for each t; rows for similarities, sets, the sets in other images, and histograms.

    Args:
        path: PNG to write.
        found: what propagation did.
        pictures: the images of the bank, (B, H, W, 3) uint8.
        names: what to call them, B of them.
        about: the bank in words.
        neighbours: how many other images are shown, nearest first.
    """
    others = found.nearest(neighbours)
    columns, rows = found.steps + 2, len(others) + 3
    side = max(1.9, min(WIDTH / columns, 3.6))  # inches
    ratios = [1, 1, *[0.72] * len(others), 0.8]
    height = side * sum(ratios) + 0.4 * rows
    figure = plt.figure(figsize=(side * columns + 0.6, HEAD + height), layout="constrained", dpi=DPI)
    head, body = figure.subfigures(2, 1, height_ratios=[HEAD, height])
    _draw_head(head, found, name=names[found.anchor[0]], about=about)
    axes = body.subplots(rows, columns, gridspec_kw={"height_ratios": ratios}, squeeze=False)
    _draw_photograph(axes[0, 0], found, pictures[found.anchor[0]])
    _draw_similarities(body, axes[0, 1:], found, side=pictures.shape[1])
    _draw_shares(axes[1, 0], found)
    for row, image in zip(axes[1:-1], [found.anchor[0], *others], strict=True):
        _draw_zones(row, found, picture=pictures[image], image=image, name=names[image])
    _draw_boundaries(axes[-1, 0], found)
    _draw_histograms(axes[-1, 1:], found)
    figure.savefig(path)
    plt.close(figure)


def _draw_head(head: SubFigure, found: Explanation, *, name: str, about: str) -> None:
    """Title, caption and legend."""
    _, row, column = found.anchor
    height, width = found.grid
    caption = f"{about}; {found.zones[0].size:,} patches, {height} x {width} an image"
    title = f"Propagation of patch {row},{column} of {Path(name).stem[:60]}"
    head.text(0.5, 0.8, title, ha="center", fontsize=15, parse_math=False)
    head.text(0.5, 0.58, caption, ha="center", fontsize=11)
    handles = [Patch(color=colour, label=label) for colour, label in zip(COLOURS, LABELS, strict=True)]
    star = {"marker": "*", "markersize": 13, "markerfacecolor": "white", "markeredgecolor": "black"}
    handles += [
        Line2D([], [], linestyle="none", label="anchor", **star),
        Line2D([], [], color="black", label=r"$\Phi_t$"),
        Line2D([], [], color="black", linestyle="dashed", label=r"$\Psi_t$"),
    ]
    columns = len(handles) if found.steps else 3
    head.legend(handles=handles, loc="lower center", ncol=columns, fontsize=11, frameon=False)


def _draw_photograph(axis: Axes, found: Explanation, picture: np.ndarray) -> None:
    axis.imshow(picture)
    own = found.similarity[:, found.anchor[0]]  # (T + 1, h, w)
    title = "the anchor"
    for t, style in {0: "dotted", found.steps: "solid"}.items():
        _contour(axis, own[t], found.phi[t], side=len(picture), style=style)
        title += rf", $\Phi_{{{t}}}$ ({style})"
    _star(axis, found, side=len(picture))
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()


def _draw_similarities(figure: SubFigure, row: Sequence[Axes], found: Explanation, *, side: int) -> None:
    own = found.similarity[:, found.anchor[0]]  # (T + 1, h, w)
    for t, axis in enumerate(row):
        shown = axis.imshow(
            _upsampled(own[t], side), vmin=own.min().item(), vmax=own.max().item(), cmap="viridis"
        )
        _contour(axis, own[t], found.phi[t], side=side)
        _star(axis, found, side=side)
        moved = rf",  $m_{{{t}}}$ = {found.moved[t]:.4f}" if t else ""
        edges = rf"$\Phi_{{{t}}}$ = {found.phi[t]:.3f},  $\Psi_{{{t}}}$ = {found.psi[t]:.3f}"
        axis.set_title(f"t = {t}{moved}\n{edges}", fontsize=10)
        axis.set_axis_off()
    bar = figure.colorbar(shown, ax=list(row), fraction=0.03, pad=0.01, aspect=30)
    bar.set_label(r"similarity $v_t \cdot f_j$", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _draw_zones(
    row: Sequence[Axes], found: Explanation, *, picture: np.ndarray, image: int, name: str
) -> None:
    """The sets of one image: a column each t; its photograph before them, unless it is the anchor's."""
    own = image == found.anchor[0]
    if not own:
        row[0].imshow(picture)
        row[0].set_title(Path(name).stem[:32], fontsize=9, parse_math=False)
        row[0].set_axis_off()
    for t, axis in enumerate(row[1:]):
        axis.imshow(painted(picture, found.zones[t, image]))
        counts = found.counts(image)[t]
        _counts_above(axis, counts, with_numbers=own)
        if own:
            _star(axis, found, side=len(picture))
        axis.set_axis_off()


def _draw_histograms(row: Sequence[Axes], found: Explanation) -> None:
    """Similarities of the whole bank by set, one panel each t, on shared axes."""
    everything = found.similarity.reshape(found.steps + 1, -1)  # (T + 1, N)
    zones = found.zones.reshape(found.steps + 1, -1)
    bins = np.linspace(everything.min(), everything.max() + 1e-6, BINS + 1)
    for t, axis in enumerate(row):
        parts = [everything[t][zones[t] == zone] for zone in range(len(ZONES))]
        axis.hist(parts, bins=bins, stacked=True, color=COLOURS, log=True)
        for value, style in ((found.phi[t], "solid"), (found.psi[t], "dashed")):
            if bins[0] <= value <= bins[-1]:
                axis.axvline(value, color="black", linestyle=style, linewidth=1.3)
        _counts_above(axis, np.array([len(part) for part in parts]))
        axis.set_xlabel("similarity", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_ylim(bottom=0.7)
        if t == 0:
            axis.set_ylabel("patches of the bank", fontsize=9)
        else:
            axis.sharey(row[0])
            axis.tick_params(labelleft=False)


def _draw_boundaries(axis: Axes, found: Explanation) -> None:
    steps = np.arange(found.steps + 1)
    for values, symbol, style in ((found.phi, r"$\Phi_t$", "solid"), (found.psi, r"$\Psi_t$", "dashed")):
        axis.plot(steps, values, color="black", linestyle=style, marker="o", markersize=4, label=symbol)
    axis.set_xticks(steps)
    axis.set_xlabel("t", fontsize=9)
    axis.set_title("boundaries", fontsize=10)
    axis.tick_params(labelsize=8)
    axis.margins(y=0.25)
    axis.legend(fontsize=9, frameon=False, loc="center right")


def _draw_shares(axis: Axes, found: Explanation) -> None:
    counts = found.counts()  # (T + 1, 3)
    shares = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    steps, below = np.arange(found.steps + 1), np.zeros(found.steps + 1)
    for share, colour in zip(shares.T, COLOURS, strict=True):
        axis.bar(steps, share, bottom=below, color=colour, width=0.6)
        below += share
    axis.set(xticks=steps, xlim=(-0.6, found.steps + 0.6), ylim=(0, 100))
    axis.set_xlabel("t", fontsize=9)
    axis.set_ylabel("% of the patches of the bank", fontsize=9)
    axis.tick_params(labelsize=8)


def painted(picture: np.ndarray, zones: np.ndarray) -> np.ndarray:
    """A grey photograph (H, W, 3) uint8 under the colours of its patches' sets (h, w), likewise."""
    height, width = picture.shape[:2]
    grey = np.asarray(Image.fromarray(picture).convert("L"))[..., None] / 255  # (H, W, 1)
    grey = 0.35 + 0.6 * grey  # dimmed, but no black that swallows a colour
    table = np.array([*(to_rgb(colour) for colour in COLOURS), (1, 1, 1)])
    opacity = np.where(np.arange(4) == ITSELF, 0, OPACITY)
    rows, columns = (np.arange(n) * part // n for n, part in zip((height, width), zones.shape, strict=True))
    spread = zones[rows[:, None], columns]  # (H, W)
    share = opacity[spread][..., None]  # (H, W, 1)
    return (255 * ((1 - share) * grey + share * table[spread])).round().astype(np.uint8)


def _upsampled(values: np.ndarray, side: int) -> np.ndarray:
    """(h, w) float32, bilinearly to (side, side)."""
    return np.asarray(Image.fromarray(values).resize((side, side), Image.Resampling.BILINEAR))


def _contour(axis: Axes, values: np.ndarray, level: float, *, side: int, style: str = "solid") -> None:
    fine = _upsampled(values, side)
    if fine.min() < level < fine.max():  # else there is no line, and matplotlib warns
        lines = axis.contour(fine, levels=[level], colors="white", linewidths=1.6, linestyles=style)
        lines.set_path_effects([withStroke(linewidth=3, foreground="black")])


def _star(axis: Axes, found: Explanation, *, side: int) -> None:
    rows, columns = found.similarity.shape[-2:]
    y, x = (side * (at + 0.5) / n - 0.5 for at, n in zip(found.anchor[1:], (rows, columns), strict=True))
    axis.plot(x, y, "*", markersize=15, markerfacecolor="white", markeredgecolor="black", clip_on=False)


def _counts_above(axis: Axes, counts: np.ndarray, *, with_numbers: bool = True) -> None:
    """How many patches each set has, (3,), and its share, above a panel and on its colour."""
    shares = counts / max(1, counts.sum())
    for place, (count, share, colour) in enumerate(zip(counts, shares, COLOURS, strict=True)):
        axis.text(
            (2 * place + 1) / (2 * len(counts)),
            1.03,
            f"{count:,}\n{100 * share:.0f}%" if with_numbers else f"{100 * share:.0f}%",
            transform=axis.transAxes,
            ha="center",
            va="bottom",
            fontsize=9,
            color="black" if ZONES[place] == "ambiguous" else "white",
            bbox={"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.25"},
        )
