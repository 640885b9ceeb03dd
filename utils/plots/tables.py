"""Markdown tables of metrics, IoU per class and sweeps, and the files of a sweep."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from utils.files import make_folder, write_json
from utils.plots.figures import draw_sweep

METRICS = ("Cluster_Accuracy", "Cluster_mIoU", "Linear_Accuracy", "Linear_mIoU")
METRIC_TITLES = tuple(name.replace("_", " ") for name in METRICS)
STAGES = {"before_crf": "before CRF", "after_crf": "after CRF"}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; all but the first are right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (header, rule, *rows):
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """A percentage with one decimal; '-' for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def metrics_table(results: dict[str, dict[str, Any]]) -> str:
    """The four metrics of each run before and after CRF, followed by the reasons for a missing CRF."""
    rows, notes = [], []
    for run, result in results.items():
        for name, each in ((run, result), (f"{run}, last step", result.get("last_step"))):
            for stage, title in STAGES.items() if each else ():
                cells = [percent((each[stage] or {}).get(metric)) for metric in METRICS]
                rows.append([f"{name}, {title}", *cells])
        if result["after_crf_missing"]:
            notes.append(f"{run}, after CRF: {result['after_crf_missing']}")
    return "\n".join([markdown(["", *METRIC_TITLES], rows), *notes])


def class_table(results: dict[str, dict[str, Any]]) -> str:
    """IoU per class in percent, one column for each run, head and stage that was evaluated."""
    columns: dict[str, dict[str, float]] = {}
    for run, result in results.items():
        for stage, suffix in zip(STAGES, ("", " CRF"), strict=True):
            for head, iou in (result["class_iou"].get(stage) or {}).items():
                columns[f"{run} {head}{suffix}"] = iou
    if not columns:
        return "no labels, so no IoU"
    names = next(iter(columns.values()))
    return markdown(
        ["IoU", *columns], [[name, *(percent(c[name]) for c in columns.values())] for name in names]
    )


def sweep_table(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Mean and sample standard deviation over the runs (seeds) of each setting, from (setting, result)."""
    rows = []
    for setting in dict.fromkeys(setting for setting, _ in results):
        group = [result for other, result in results if other == setting]
        for stage, title in STAGES.items():
            cells = [_mean_and_deviation([(r[stage] or {}).get(name) for r in group]) for name in METRICS]
            rows.append([f"{setting or 'all'}, {title}", str(len(group)), *cells])
    return markdown(["setting", "runs", *METRIC_TITLES], rows)


def _mean_and_deviation(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.1f} ± {stdev(known):.1f}" if len(known) > 1 else percent(next(iter(known), None))


def sets_table(rows: Sequence[dict[str, float]]) -> str:
    """Quality and size of the sets after t = 0..T relocations, in percent, averaged over anchors."""
    header = ["t", "precision of positives", "recall of positives", "purity of negatives"]
    header += ["positives", "ambiguous", "negatives"]
    keys = [title.split(" of ")[0] for title in header[1:]]
    return markdown(header, [[str(t), *(percent(row[key]) for key in keys)] for t, row in enumerate(rows)])


def explanation_table(result: dict[str, Any]) -> str:
    """The result of `explain_image`: m_t, the boundaries and the sizes of the sets, one row for each t."""
    formats = {"t": "d", "moved": ".4f", "phi": ".4f", "psi": ".4f"}
    formats |= dict.fromkeys(("positives", "ambiguous", "negatives"), ",d")
    rows = [[format(step[key], style) for key, style in formats.items()] for step in result["steps"]]
    row, column = result["patch"]
    return f"{result['image']}, patch {row},{column}\n" + markdown(list(formats), rows)


def write_sweep(folder: Path, results: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Writes sweep.json, (setting, result) of each run, and sweep.png, a figure of the metrics before CRF."""
    make_folder(folder)
    kept = ("step", *STAGES, "train_hours", "checkpoint")
    rows = [{"setting": setting} | {key: result.get(key) for key in kept} for setting, result in results]
    write_json(folder / "sweep.json", rows)
    scored = [(setting, result["before_crf"]) for setting, result in results if result["before_crf"]]
    if scored:
        draw_sweep(folder / "sweep.png", scored)
