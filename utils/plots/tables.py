"""Tables of metrics, IoU per class, sweeps and sets: for an 80-column terminal, and in Markdown."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from textwrap import fill
from typing import Any

from utils.progress import COLUMNS

METRICS = ("Cluster_Accuracy", "Cluster_mIoU", "Linear_Accuracy", "Linear_mIoU")
METRIC_TITLES = tuple(name.replace("_", " ") for name in METRICS)
COST_TITLES = ("s / step", "parameters")
STAGES = {"before_crf": "before CRF", "after_crf": "after CRF"}
NO_METRICS = "no labels, so no metrics"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, or `NO_METRICS` without rows; all columns but the first are right-aligned."""
    if not rows:
        return NO_METRICS
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def percent(value: float | None) -> str:
    """A percentage with one decimal; '-' for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal of 80 columns, two spaces apart; a long first cell gets its own line.

    `NO_METRICS` without rows.
    """
    if not rows:
        return NO_METRICS
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    widths[0] = min(widths[0], COLUMNS - sum(width + 2 for width in widths[1:]))
    lines = []
    for first, *others in (header, *rows):
        if len(first) > widths[0]:
            lines, first = [*lines, first], ""
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def metrics_table(results: dict[str, dict[str, Any]]) -> str:
    """Accuracy and mIoU of each run before and after CRF, followed by the reasons for a missing CRF."""
    rows, notes = [], []
    for run, result in results.items():
        for name, each in ((run, result), (f"{run}, last step", result.get("last_step"))):
            for stage, title in STAGES.items() if each else ():
                if metrics := each[stage]:
                    rows.append([f"{name}, {title}", *_pairs(_percents(metrics))])
        if result["after_crf_missing"] and result["before_crf"]:
            notes.append(f"{run}, after CRF: {result['after_crf_missing']}")
        if shares := result.get("cluster_shares"):
            parts = ", ".join(f"{cluster}: {percent(share)}" for cluster, share in shares.items())
            notes.append(fill(f"{run}: cluster sizes in these images, in percent: {parts}", COLUMNS))
    table = [text_table(["accuracy / mIoU, %", "clusters", "linear probe"], rows)] if rows else []
    return "\n".join([*table, *notes])


def _percents(metrics: Mapping[str, float]) -> list[str]:
    return [percent(metrics.get(name)) for name in METRICS]


def _pairs(cells: Sequence[str]) -> list[str]:
    """Accuracy / mIoU of the clusters and of the linear probe, from the cells of `METRICS`."""
    return [f"{cells[0]} / {cells[1]}", f"{cells[2]} / {cells[3]}"]


def metrics_markdown(result: dict[str, Any]) -> str:
    """Metrics and IoU per class of one run, in Markdown; without labels, the sizes of the clusters."""
    if shares := result.get("cluster_shares"):
        rows = [[cluster, percent(share)] for cluster, share in shares.items()]
        return markdown(["cluster", "% of the pixels"], rows) + "\n"
    rows = [[title, *_percents(result[stage])] for stage, title in STAGES.items() if result[stage]]
    header, classes = _class_rows(result)
    return "\n\n".join([markdown(["%", *METRIC_TITLES], rows), markdown(header, classes)]) + "\n"


def class_table(result: dict[str, Any]) -> str:
    """IoU per class in percent of each head, before and, if it was evaluated, after CRF."""
    return text_table(*_class_rows(result))


def _class_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    before, after = (result["class_iou"].get(stage) or {} for stage in STAGES)
    arrow, rows = " -> CRF" if after else "", []
    for name in next(iter(before.values()), ()):
        refined = {head: f" -> {percent(iou[name])}" for head, iou in after.items()}
        rows.append([name, *(percent(iou[name]) + refined.get(head, "") for head, iou in before.items())])
    return ["IoU, %", *(f"{head}{arrow}" for head in before)], rows


def sweep_table(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Mean and sample standard deviation over the runs (seeds) of each setting, from (setting, result)."""
    rows = [[*row[:2], *_pairs(row[2:])] for row in sweep_rows(results)]
    table = text_table(["accuracy / mIoU, %", "runs", "clusters", "linear probe"], rows)
    costs = [[setting, *_cost(group)] for setting, group in _by_setting(results).items()]
    costs = [row for row in costs if row[-1] != "-"]  # the last step of a run has none
    differ = len({parameters for *_, parameters in costs}) > 1
    return f"{table}\n\n{text_table(['', *COST_TITLES], costs)}" if differ else table


def _by_setting(results: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for setting, result in results:
        groups.setdefault(setting or "all", []).append(result)
    return groups


def sweep_rows(results: Sequence[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """Setting and stage, number of runs, "mean ± standard deviation" of each of `METRICS`, and the cost.

    The cost is the mean of the seconds of a step, and the trainable parameters of the method.
    """
    rows = []
    for setting, group in _by_setting(results).items():
        for stage, title in STAGES.items():
            if metrics := [result[stage] for result in group if result[stage]]:
                cells = [_mean_and_deviation([each.get(name) for each in metrics]) for name in METRICS]
                rows.append([f"{setting}, {title}", str(len(group)), *cells, *_cost(group)])
    return rows


def _cost(results: Sequence[dict[str, Any]]) -> list[str]:
    seconds = [result["step_seconds"] for result in results if "step_seconds" in result]
    parameters = results[0].get("trainable_parameters")
    return [f"{mean(seconds):.2f}" if seconds else "-", "-" if parameters is None else f"{parameters:,}"]


def _mean_and_deviation(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.1f} ± {stdev(known):.1f}" if len(known) > 1 else percent(next(iter(known), None))


def sets_table(rows: Sequence[dict[str, float]]) -> str:
    """Quality and size of the sets after t = 0..T relocations, in percent, averaged over anchors."""
    keys = ("precision", "recall", "purity", "positives", "ambiguous", "negatives")
    cells = [[str(t), *(percent(row[key]) for key in keys)] for t, row in enumerate(rows)]
    table = text_table(["t", *keys], cells)
    return f"percent; precision and recall of positives, purity of negatives\n{table}"


def explanation_table(result: dict[str, Any]) -> str:
    """The result of `explain_image`: m_t, the boundaries and the sizes of the sets, one row for each t."""
    formats = {"t": "d", "moved": ".4f", "phi": ".4f", "psi": ".4f"}
    formats |= dict.fromkeys(("positives", "ambiguous", "negatives"), ",d")
    rows = [[format(step[key], style) for key, style in formats.items()] for step in result["steps"]]
    row, column = result["patch"]
    return f"{result['image']}, patch {row},{column}\n" + text_table(list(formats), rows)


def suggestion_table(result: dict[str, Any]) -> str:
    """The result of `suggest`: sizes of the sets, the boundaries, warnings and words for the command line."""
    keys, clusters = ("positives", "ambiguous", "negatives"), result["clusters"]
    rows = [[str(t), *(percent(row[key]) for key in keys)] for t, row in enumerate(result["shares"])]
    precision, recall = percent(result["precision"]), percent(result["recall"])
    lines = [
        f"percent of a batch's patches; {result['images']} train items, no labels",
        text_table(["t", *keys], rows),
        "",
        f"Phi_0 = {result['initialcrit_pos']}: about {precision}% of the positives have the anchor's class",
        f"Psi_0 = {result['initialcrit_amb']}: about {recall}% of the pairs of one class are above it",
        f"number of clusters: {clusters or 'none of 2 to 64 is clearly stable'}",
        *(f"warning: {warning}" for warning in result["warnings"]),
        f"add to the command line:\n  {result['words']}",
    ]
    return "\n".join(lines)
