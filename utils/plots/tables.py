"""Tables to print and to paste: the four metrics, IoU per class, and sweeps."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from utils.files import make_folder, write_json

METRICS = ("Cluster_Accuracy", "Cluster_mIoU", "Linear_Accuracy", "Linear_mIoU")
STAGES = {"before_crf": "before CRF", "after_crf": "after CRF"}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, numbers to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (header, rule, *rows):
        first = row[0].ljust(widths[0])
        lines.append(
            "| " + " | ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) + " |"
        )
    return "\n".join(lines)


def metrics_table(results: dict[str, dict[str, Any]]) -> str:
    """The four metrics of each run before and after CRF, in percent; a reason where CRF is missing."""
    rows, notes = [], []
    for run, result in results.items():
        found = {run: result} | ({f"{run}, last step": result["last_step"]} if "last_step" in result else {})
        for name, each in found.items():
            for stage, title in STAGES.items():
                cells = [_percent((each[stage] or {}).get(metric)) for metric in METRICS]
                rows.append([f"{name}, {title}", *cells])
        if result["after_crf_missing"]:
            notes.append(f"{run}, after CRF: {result['after_crf_missing']}")
    return "\n".join([markdown(["", *(name.replace("_", " ") for name in METRICS)], rows), *notes])


def class_table(results: dict[str, dict[str, Any]]) -> str:
    """IoU per class in percent: a column for each run, head and stage that exists."""
    columns: dict[str, dict[str, float]] = {}
    for run, result in results.items():
        for stage, title in STAGES.items():
            for head, iou in (result["class_iou"].get(stage) or {}).items():
                columns[f"{run} {head}{' CRF' if title == 'after CRF' else ''}"] = iou
    if not columns:
        return "no labels, so no IoU"
    names = list(next(iter(columns.values())))
    return markdown(
        ["IoU", *columns], [[name, *(_percent(c[name]) for c in columns.values())] for name in names]
    )


def sweep_table(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Mean and sample standard deviation over the runs (seeds) of each setting.

    Args:
        results: (setting, result) for each run, in order.
    """
    rows = []
    for setting in dict.fromkeys(setting for setting, _ in results):
        group = [result for other, result in results if other == setting]
        for stage, title in STAGES.items():
            cells = [_spread([(r[stage] or {}).get(name) for r in group]) for name in METRICS]
            rows.append([f"{setting or 'all'}, {title}", str(len(group)), *cells])
    return markdown(["setting", "runs", *(name.replace("_", " ") for name in METRICS)], rows)


def sets_table(rows: Sequence[dict[str, float]]) -> str:
    """Quality and size of the sets after t = 0..T relocations, in percent, means over anchors."""
    columns = {
        "precision of positives": "precision",
        "recall of positives": "recall",
        "purity of negatives": "purity",
        "positives": "positives",
        "ambiguous": "ambiguous",
        "negatives": "negatives",
    }
    cells = [[str(t), *(_percent(row[key]) for key in columns.values())] for t, row in enumerate(rows)]
    return markdown(["t", *columns], cells)


def explanation_table(result: dict[str, Any]) -> str:
    """What eval.explain gives, a row for each t: m_t, boundaries, and the sizes of the sets in the bank."""
    columns = {"t": "d", "moved": ".4f", "phi": ".4f", "psi": ".4f"}
    columns |= dict.fromkeys(("positives", "ambiguous", "negatives"), ",d")
    rows = [[format(step[key], style) for key, style in columns.items()] for step in result["steps"]]
    row, column = result["patch"]
    return f"{result['image']}, patch {row},{column}\n" + markdown(list(columns), rows)


def read_scalars(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv without their empty cells; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]


def write_sweep(folder: Path, results: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """sweep.json, the metrics of every run, and sweep.png, those before CRF as a figure.

    Args:
        folder: where they go.
        results: (setting, result) for each run, in order.
    """
    from utils.plots.figures import draw_sweep

    make_folder(folder)
    kept = ("step", *STAGES, "train_hours", "checkpoint")
    rows = [{"setting": s, **{key: result.get(key) for key in kept}} for s, result in results]
    write_json(folder / "sweep.json", rows)
    scored = [(setting, result["before_crf"]) for setting, result in results if result["before_crf"]]
    if scored:
        draw_sweep(folder / "sweep.png", scored)


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{mean(known):.1f} ± {stdev(known):.1f}" if len(known) > 1 else f"{known[0]:.1f}"
