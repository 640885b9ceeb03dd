"""Figure of the propagation of one anchor: similarity maps, sets and histograms for t = 0..T."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

SETS = ("positives", "ambiguous", "negatives")
POSITIVE, AMBIGUOUS, NEGATIVE, ANCHOR = range(4)  # values of `Explanation.zones`
COLOURS = ("#0072b2", "#f0e442", "#d55e00")  # of SETS, distinct to the colour-blind (Okabe and Ito)
LABELS = (
    r"positives: $v_t \cdot f_j > \Phi_t$",
    "ambiguous zone: left out",
    r"negatives: $v_t \cdot f_j < \Psi_t$",
)
STYLE = {
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
}
STAR = {"marker": "*", "markerfacecolor": "white", "markeredgecolor": "black"}
OPACITY = 0.55  # of a set over its image
DPI = 105
WIDTH = 13.4  # inches, of all columns together
HEAD = 1.15  # inches, of title, caption and legend
BINS = 60


@dataclass(frozen=True)
class Explanation:
    """The proxy of one anchor at t = 0..T in a bank of B images of h x w patches.

    Attributes:
        anchor: (image, row, column) of the anchor's patch.
        similarity: v_t . f_j, (T + 1, B, h, w) float32.
        zones: (T + 1, B, h, w) uint8: POSITIVE, AMBIGUOUS, NEGATIVE, or ANCHOR, which is in no set.
        phi: Phi_t, (T + 1,) float32.
        psi: Psi_t, (T + 1,) float32.
        moved: m_t, by how much v_t differs from v_{t-1}, (T + 1,) float32; 0 at t = 0.
    """

    anchor: tuple[int, int, int]
    similarity: np.ndarray
    zones: np.ndarray
    phi: np.ndarray
    psi: np.ndarray
    moved: np.ndarray

    @property
    def steps(self) -> int:
        """T."""
        return len(self.phi) - 1

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return self.zones.shape[2:]

    def counts(self, image: int | None = None) -> np.ndarray:
        """Patches in each of `SETS` for t = 0..T, (T + 1, 3) int64, of one image or of the bank."""
        zones = self.zones if image is None else self.zones[:, image]
        flat = zones.reshape(len(zones), -1)  # (T + 1, patches)
        return np.stack([(flat == zone).sum(axis=1) for zone in range(len(SETS))], axis=1)

    def nearest(self, count: int) -> list[int]:
        """The other images, sorted by the sum of v_T . f_j over their positives, then over all patches."""
        similarity = self.similarity[-1].reshape(self.similarity.shape[1], -1)  # (B, h * w)
        positive = self.zones[-1].reshape(similarity.shape) == POSITIVE
        mass = np.where(positive, similarity, 0).sum(axis=1)  # (B,)
        order = np.lexsort((-similarity.sum(axis=1), -mass)).tolist()
        return [image for image in order if image != self.anchor[0]][:count]

    def numbers(self) -> list[dict[str, Any]]:
        """For t = 0..T: boundaries, m_t, and the sizes of the sets in the bank and in the anchor's image."""
        bank, own = self.counts().tolist(), self.counts(self.anchor[0]).tolist()
        return [
            {
                "t": t,
                "phi": self.phi[t].item(),
                "psi": self.psi[t].item(),
                "moved": self.moved[t].item(),
                **dict(zip(SETS, bank[t], strict=True)),
                "in_image": dict(zip(SETS, own[t], strict=True)),
            }
            for t in range(self.steps + 1)
        ]


@matplotlib.rc_context(STYLE)
def draw_explanation(
    path: Path,
    found: Explanation,
    *,
    pictures: np.ndarray,
    names: Sequence[str],
    about: str,
    neighbours: int = 3,
) -> None:
    """One column per t; rows of similarities, sets, sets in other images, and histograms.

    Args:
        path: PNG to write.
        found: the propagation.
        pictures: images of the bank, (B, H, W, 3) uint8.
        names: of the images.
        about: description of the bank.
        neighbours: number of other images, nearest first.
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
    _, row, column = found.anchor
    height, width = found.grid
    caption = f"{about}; {found.zones[0].size:,} patches, {height} x {width} an image"
    title = f"Propagation of patch {row},{column} of {Path(name).stem[:60]}"
    head.text(0.5, 0.8, title, ha="center", fontsize=15, parse_math=False)
    head.text(0.5, 0.58, caption, ha="center", fontsize=11)
    handles = [Patch(color=colour, label=label) for colour, label in zip(COLOURS, LABELS, strict=True)]
    handles += [
        Line2D([], [], linestyle="none", label="anchor", markersize=13, **STAR),
        Line2D([], [], color="black", label=r"$\Phi_t$"),
        Line2D([], [], color="black", linestyle="dashed", label=r"$\Psi_t$"),
    ]
    columns = len(handles) if found.steps else 3
    head.legend(handles=handles, loc="lower center", ncol=columns, fontsize=11)


def _draw_photograph(axis: Axes, found: Explanation, picture: np.ndarray) -> None:
    axis.imshow(picture)
    own = found.similarity[:, found.anchor[0]]  # (T + 1, h, w)
    title = "the anchor"
    for t, style in {0: "dotted", found.steps: "solid"}.items():
        _contour(axis, own[t], found.phi[t], side=len(picture), style=style)
        title += rf", $\Phi_{{{t}}}$ ({style})"
    _star(axis, found, side=len(picture))
    axis.set_title(title)
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
        axis.set_title(f"t = {t}{moved}\n{edges}")
        axis.set_axis_off()
    bar = figure.colorbar(shown, ax=list(row), fraction=0.03, pad=0.01, aspect=30)
    bar.set_label(r"similarity $v_t \cdot f_j$")


def _draw_zones(
    row: Sequence[Axes], found: Explanation, *, picture: np.ndarray, image: int, name: str
) -> None:
    """The sets of one image for each t; its first column has the image, unless it is the anchor's."""
    own = image == found.anchor[0]
    if not own:
        row[0].imshow(picture)
        row[0].set_title(Path(name).stem[:32], fontsize=9, parse_math=False)
        row[0].set_axis_off()
    for t, axis in enumerate(row[1:]):
        axis.imshow(painted(picture, found.zones[t, image]))
        _counts_above(axis, found.counts(image)[t], with_numbers=own)
        if own:
            _star(axis, found, side=len(picture))
        axis.set_axis_off()


def _draw_histograms(row: Sequence[Axes], found: Explanation) -> None:
    """Similarities of the whole bank by set for each t, on shared axes."""
    everything = found.similarity.reshape(found.steps + 1, -1)  # (T + 1, N)
    zones = found.zones.reshape(found.steps + 1, -1)
    bins = np.linspace(everything.min(), everything.max() + 1e-6, BINS + 1)
    for t, axis in enumerate(row):
        parts = [everything[t][zones[t] == zone] for zone in range(len(SETS))]
        axis.hist(parts, bins=bins, stacked=True, color=COLOURS, log=True)
        for value, style in ((found.phi[t], "solid"), (found.psi[t], "dashed")):
            if bins[0] <= value <= bins[-1]:
                axis.axvline(value, color="black", linestyle=style, linewidth=1.3)
        _counts_above(axis, np.array([len(part) for part in parts]))
        axis.set_xlabel("similarity")
        axis.set_ylim(bottom=0.7)
        if t:
            axis.sharey(row[0])
            axis.tick_params(labelleft=False)
    row[0].set_ylabel("patches of the bank")


def _draw_boundaries(axis: Axes, found: Explanation) -> None:
    steps = np.arange(found.steps + 1)
    for values, symbol, style in ((found.phi, r"$\Phi_t$", "solid"), (found.psi, r"$\Psi_t$", "dashed")):
        axis.plot(steps, values, color="black", linestyle=style, marker="o", markersize=4, label=symbol)
    axis.set(xticks=steps, xlabel="t", title="boundaries")
    axis.margins(y=0.25)
    axis.legend(fontsize=9, loc="center right")


def _draw_shares(axis: Axes, found: Explanation) -> None:
    counts = found.counts()  # (T + 1, 3)
    shares = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    steps, below = np.arange(found.steps + 1), np.zeros(found.steps + 1)
    for share, colour in zip(shares.T, COLOURS, strict=True):
        axis.bar(steps, share, bottom=below, color=colour, width=0.6)
        below += share
    axis.set(xticks=steps, xlim=(-0.6, found.steps + 0.6), ylim=(0, 100))
    axis.set(xlabel="t", ylabel="% of the patches of the bank")


def painted(picture: np.ndarray, zones: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 in grey, tinted by the sets (h, w) of its patches."""
    grey = np.asarray(Image.fromarray(picture).convert("L"))[..., None] / 255  # (H, W, 1)
    grey = 0.35 + 0.6 * grey  # black would hide a colour
    zones = Image.fromarray(zones).resize(picture.shape[1::-1], Image.Resampling.NEAREST)
    colours = np.array([*map(to_rgb, COLOURS), (1, 1, 1)])[np.asarray(zones)]  # (H, W, 3)
    opacity = np.where(np.asarray(zones) == ANCHOR, 0, OPACITY)[..., None]  # (H, W, 1)
    return (255 * ((1 - opacity) * grey + opacity * colours)).round().astype(np.uint8)


def _upsampled(values: np.ndarray, side: int) -> np.ndarray:
    """(h, w) float32, bilinearly to (side, side)."""
    return np.asarray(Image.fromarray(values).resize((side, side), Image.Resampling.BILINEAR))


def _contour(axis: Axes, values: np.ndarray, level: float, *, side: int, style: str = "solid") -> None:
    fine = _upsampled(values, side)
    if fine.min() < level < fine.max():  # else there is no line, and matplotlib warns
        lines = axis.contour(fine, levels=[level], colors="white", linewidths=1.6, linestyles=style)
        lines.set_path_effects([withStroke(linewidth=3, foreground="black")])


def _star(axis: Axes, found: Explanation, *, side: int) -> None:
    y, x = (side * (at + 0.5) / n - 0.5 for at, n in zip(found.anchor[1:], found.grid, strict=True))
    axis.plot(x, y, markersize=15, clip_on=False, **STAR)


def _counts_above(axis: Axes, counts: np.ndarray, *, with_numbers: bool = True) -> None:
    """Writes the sizes of the sets, (3,), and their shares above a panel, on their colours."""
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
            color="black" if place == AMBIGUOUS else "white",
            bbox={"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.25"},
        )
