"""Figure of the propagation of one anchor: similarity maps, sets and histograms for t = 0..T."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL import Image

from utils.plots.figures import SET_COLOURS, SETS, save_figure  # selects a backend without a display

POSITIVE, AMBIGUOUS, NEGATIVE, ANCHOR = range(4)  # values of `Explanation.zones`
LABELS = (r"positives: $v_t \cdot f_j > \Phi_t$", "ambiguous zone", r"negatives: $v_t \cdot f_j < \Psi_t$")
STAR = {"marker": "*", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 15}
OPACITY = 0.55  # of a set over its image


@dataclass(frozen=True)
class Explanation:
    """The proxy of a patch of the first image at t = 0..T, in a bank of B images of h x w patches."""

    anchor: tuple[int, int]  # row and column of the patch
    similarity: np.ndarray  # v_t . f_j, (T + 1, B, h, w) float32
    zones: np.ndarray  # POSITIVE, AMBIGUOUS, NEGATIVE, or ANCHOR, which is in no set, (T + 1, B, h, w) uint8
    phi: np.ndarray  # Phi_t, (T + 1,) float32
    psi: np.ndarray  # Psi_t, (T + 1,) float32
    moved: np.ndarray  # m_t, by how much v_t differs from v_{t-1}, (T + 1,) float32; 0 at t = 0

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return self.zones.shape[2:]

    def counts(self) -> np.ndarray:
        """Patches in each of `SETS`, (T + 1, B, 3) int64."""
        return np.stack([(self.zones == zone).sum(axis=(2, 3)) for zone in range(len(SETS))], axis=2)

    def nearest(self, count: int) -> list[int]:
        """The other images with the largest sums of v_T . f_j over their positives."""
        mass = np.where(self.zones[-1] == POSITIVE, self.similarity[-1], 0).sum(axis=(1, 2))  # (B,)
        return (1 + np.argsort(-mass[1:], kind="stable")[:count]).tolist()

    def numbers(self) -> list[dict[str, Any]]:
        """For t = 0..T: boundaries, m_t, and the sizes of the sets in the bank and in the anchor's image."""
        return [
            {"t": t, "phi": float(self.phi[t]), "psi": float(self.psi[t]), "moved": float(self.moved[t])}
            | dict(zip(SETS, counts.sum(axis=0).tolist(), strict=True))
            | {"in_image": dict(zip(SETS, counts[0].tolist(), strict=True))}
            for t, counts in enumerate(self.counts())
        ]


def draw_explanation(path: Path, found: Explanation, *, pictures: np.ndarray, names: Sequence[str]) -> None:
    """One column per t; rows of similarities, sets, sets in the three nearest images, and histograms.

    `pictures`, (B, H, W, 3) uint8, and `names` are those of the bank's images.
    """
    shown = [0, *found.nearest(3)]
    rows, columns = len(shown) + 2, len(found.phi) + 1
    side = max(1.9, min(13.4 / columns, 3.6))  # inches
    size = (side * columns + 0.6, (side + 0.3) * rows + 1)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    row, column = found.anchor
    title = f"Propagation of patch {row},{column} of {Path(names[0]).stem[:60]}"
    about = f"bank: {len(pictures)} images, {found.zones[0].size:,} patches"
    figure.suptitle(f"{title}\n{about}", fontsize=13, parse_math=False)
    for axis in (*axes[:-1].flat, axes[-1, 0]):
        axis.set_axis_off()
    handles = [
        *(Patch(color=colour, label=label) for colour, label in zip(SET_COLOURS, LABELS, strict=True)),
        Line2D([], [], linestyle="none", label="anchor", **STAR),
        Line2D([], [], color="black", label=r"$\Phi_t$"),
        Line2D([], [], color="black", linestyle="dashed", label=r"$\Psi_t$"),
    ]
    axes[0, 0].legend(handles=handles, loc="center", fontsize=10, frameon=False)
    pixels = pictures.shape[1]
    _draw_similarities(axes[0, 1:], found, pixels=pixels)
    for line, image in zip(axes[1:-1], shown, strict=True):
        line[0].imshow(pictures[image])
        line[0].set_title(Path(names[image]).stem[:32], fontsize=9, parse_math=False)
        for t, axis in enumerate(line[1:]):
            axis.imshow(painted(pictures[image], found.zones[t, image]))
            _draw_counts(axis, found.counts()[t, image])
    y, x = (pixels * (at + 0.5) / n - 0.5 for at, n in zip(found.anchor, found.grid, strict=True))
    for axis in axes[:2].flat[1:]:
        axis.plot(x, y, **STAR)
    _draw_histograms(axes[-1, 1:], found)
    save_figure(figure, path, dpi=105, bbox_inches=None)


def _draw_similarities(row: Sequence[Axes], found: Explanation, *, pixels: int) -> None:
    own = found.similarity[:, 0]  # (T + 1, h, w)
    for t, axis in enumerate(row):
        fine = np.asarray(Image.fromarray(own[t]).resize((pixels, pixels), Image.Resampling.BILINEAR))
        shown = axis.imshow(fine, vmin=own.min(), vmax=own.max())
        if fine.min() < found.phi[t] < fine.max():  # otherwise matplotlib warns that there is no line
            lines = axis.contour(fine, levels=[found.phi[t]], colors="white", linewidths=1.6)
            lines.set_path_effects([withStroke(linewidth=3, foreground="black")])
        edges = rf"$\Phi_{{{t}}}$ = {found.phi[t]:.3f},  $\Psi_{{{t}}}$ = {found.psi[t]:.3f}"
        axis.set_title(rf"t = {t},  $m_{{{t}}}$ = {found.moved[t]:.4f}" + f"\n{edges}", fontsize=10)
    axis.figure.colorbar(shown, ax=list(row), fraction=0.03, pad=0.01, label=r"similarity $v_t \cdot f_j$")


def _draw_histograms(row: Sequence[Axes], found: Explanation) -> None:
    """Similarities of the whole bank by set for each t, on shared axes."""
    bins = np.linspace(found.similarity.min(), found.similarity.max() + 1e-6, 61)
    for t, axis in enumerate(row):
        parts = [found.similarity[t][found.zones[t] == zone] for zone in range(len(SETS))]
        axis.hist(parts, bins=bins, stacked=True, color=SET_COLOURS, log=True)
        for value, style in ((found.phi[t], "solid"), (found.psi[t], "dashed")):
            if bins[0] <= value <= bins[-1]:
                axis.axvline(value, color="black", linestyle=style)
        _draw_counts(axis, found.counts()[t].sum(axis=0))
        axis.set(xlabel="similarity", ylim=(0.7, None))
        axis.sharey(row[0])
    row[0].set_ylabel("patches of the bank")


def _draw_counts(axis: Axes, counts: np.ndarray) -> None:
    """Writes the sizes of the sets, (3,), and their shares above a panel, on their colours."""
    for place, (count, colour) in enumerate(zip(counts, SET_COLOURS, strict=True)):
        text = f"{count:,}\n{count / max(1, counts.sum()):.0%}"
        box = {"facecolor": colour, "alpha": 0.6, "edgecolor": "none", "boxstyle": "square,pad=0.2"}
        where = {"transform": axis.transAxes, "ha": "center", "va": "bottom"}
        axis.text((2 * place + 1) / 6, 1.03, text, fontsize=9, bbox=box, **where)


def painted(picture: np.ndarray, zones: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 in grey, tinted by the sets (h, w) of its patches."""
    grey = np.asarray(Image.fromarray(picture).convert("L"))[..., None] / 255  # (H, W, 1)
    grey = 0.35 + 0.6 * grey  # black would hide a colour
    zones = Image.fromarray(zones).resize(picture.shape[1::-1], Image.Resampling.NEAREST)
    colours = np.array([*map(to_rgb, SET_COLOURS), (1, 1, 1)])[np.asarray(zones)]  # (H, W, 3)
    opacity = np.where(np.asarray(zones) == ANCHOR, 0, OPACITY)[..., None]  # (H, W, 1)
    return (255 * ((1 - opacity) * grey + opacity * colours)).round().astype(np.uint8)
