"""Figure of suggested boundaries: similarities, estimates, sizes of the sets and stability of clusters."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from utils.plots.figures import SET_COLOURS, draw_shares, save_figure

ADJACENT, RANDOM = "#009e73", "#cc79a7"  # colour-blind safe (Okabe and Ito)


def draw_suggestion(path: Path, result: dict[str, Any], curves: dict[str, np.ndarray]) -> None:
    """Draws the content of suggest.json.

    `curves` are the fields of `Estimate` by name, (G,) each: `threshold`, `precision`, `recall` and the
    densities `adjacent` and `random`.
    """
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
    phi, psi = result["initialcrit_pos"], result["initialcrit_amb"]
    about = f"{result['images']} train items, {result['patches']:,} patches, no labels"
    figure.suptitle(rf"Suggested boundaries: $\Phi_0$ = {phi}, $\Psi_0$ = {psi}" + f"\n{about}", fontsize=13)
    _draw_similarities(axes[0, 0], result, curves)
    _draw_estimates(axes[0, 1], result, curves)
    draw_shares(axes[1, 0], result["shares"])
    axes[1, 0].set_title("Sets of propagation with these boundaries")
    _draw_stability(axes[1, 1], result)
    for axis in axes[0]:
        axis.axvline(phi, color="black", label=r"$\Phi_0$")
        axis.axvline(psi, color="black", linestyle="dashed", label=r"$\Psi_0$")
        axis.set(xlabel="similarity", xlim=(curves["threshold"][0], 1))
        axis.legend(fontsize=9, frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=105, bbox_inches=None)


def _draw_similarities(axis: Axes, result: dict[str, Any], curves: dict[str, np.ndarray]) -> None:
    edges = np.append(curves["threshold"], 1)  # (G + 1,)
    centres, bins = (edges[1:] + edges[:-1]) / 2, edges[:: max(1, len(edges) // 80)]
    for name, colour in (("adjacent", ADJACENT), ("random", RANDOM)):
        how = {"bins": bins, "weights": curves[name], "density": True, "color": colour}
        axis.hist(centres, **how, alpha=0.45, label=f"{name} patches")
        axis.hist(centres, **how, histtype="step")
    title = f"Adjacent patches are more similar in {result['separation']:.0f}% of the cases"
    axis.set(ylabel="density", title=title)


def _draw_estimates(axis: Axes, result: dict[str, Any], curves: dict[str, np.ndarray]) -> None:
    for name, colour, at in (("precision", SET_COLOURS[0], "pos"), ("recall", SET_COLOURS[2], "amb")):
        axis.plot(curves["threshold"], 100 * curves[name], color=colour, label=f"{name} above it")
        axis.plot(result[f"initialcrit_{at}"], result[name], "o", color=colour)
    axis.set(ylabel="estimated %", ylim=(0, 101), title="Pairs of one class")


def _draw_stability(axis: Axes, result: dict[str, Any]) -> None:
    sizes, mean, deviation = (np.array(result[key]) for key in ("sizes", "agreement", "agreement_deviation"))
    axis.fill_between(sizes, mean - deviation, mean + deviation, color="0.85")
    axis.plot(sizes, mean, "o-", color="0.25", markersize=4)
    clusters, title = result["clusters"], "no clear number"
    if clusters is not None:
        axis.axvline(clusters, color="black", linestyle="dotted")
        title = f"{clusters} are clearly stable"
    axis.set(xscale="log", xlabel="number of clusters", ylabel="agreement of resamples", ylim=(0, 1.02))
    axis.set_xticks([2, 4, 8, 16, 32, 64], labels=["2", "4", "8", "16", "32", "64"])
    axis.minorticks_off()
    axis.set_title(f"Stability of k-means: {title}")
