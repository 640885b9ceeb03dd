"""Writes report.html, a self-contained page about one run, from the files in its folder."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from utils.config.loading import as_tree, flatten
from utils.config.options import Options
from utils.files import read_json_object, write_text
from utils.plots.tables import METRIC_TITLES, METRICS, STAGES, percent, read_scalars
from utils.vision.labels import LabelSpace

TEMPLATE = Path(__file__).with_suffix(".html")
NAME = "report.html"
MAX_POINTS = 300  # per curve; longer curves are averaged
CURVES = (  # title, scalars, description, whether the axis is logarithmic
    ("Loss", ("total_loss", "supcon_loss"), "total_loss = supcon_loss + losses of the probes", False),
    ("Probes", ("linear_loss", "cluster_loss"), "cross-entropy; negative cosine to the centroids", False),
    ("Metrics", METRICS, "percent, on the validation set, before CRF", False),
    ("Positives and negatives", ("num_positives", "num_negatives"), "patches per anchor", True),
    ("Boundaries", ("mean_phi", "mean_psi"), "Phi_T and Psi_T, mean over anchors", False),
    ("Degree of propagation", ("mean_propagation",), "m_1 + ... + m_T, mean over anchors", False),
    ("Anchors without a positive", ("without_positives",), "share of the anchors; they add no loss", False),
    ("Validation loss", ("valid_loss",), "cluster loss on the upsampled code", False),
    ("Gradient norm", ("grad_norm",), "head and projection, before clipping", False),
    ("Parameter norm", ("param_norm",), "head and projection", False),
    ("Throughput", ("images_per_s",), "images per second, excluding validation", False),
    ("GPU memory", ("gpu_memory_gib",), "peak, in GiB", False),
)
PICTURES = {  # title -> description; the files are predictions.png, ...
    "Predictions": "Images from across the validation set; clusters have the colour of their matched class.",
    "Confusion": "Before CRF; each row in percent of its true class.",
    "Explanation": "Propagation for one anchor: similarities, sets and boundaries after t = 0..T "
    "relocations. It depends only on the frozen features and is the same throughout a run.",
}


def write_report(
    folder: Path, *, labels: LabelSpace, state: str, result: dict[str, Any], pictures: bool = True
) -> None:
    """Writes report.html into the folder of a run.

    Args:
        folder: holds options.json, provenance.json and, once scalars have been logged, metrics.csv.
        labels: class names and colours.
        state: one sentence about the progress of the run.
        result: the content of metrics.json; during training, the part of it that is known.
        pictures: whether to embed the PNG figures in the folder.
    """
    options = read_json_object(folder / "options.json")
    rows = read_scalars(folder / "metrics.csv")
    facts = {
        "name": options["wandb"]["name"],
        "summary": _summary(options, labels),
        "state": state,
        "metrics": METRIC_TITLES,
        "results": _results(rows, result),
        "after_crf_missing": result.get("after_crf_missing"),
        "charts": _charts(rows),
        "heads": _class_iou(result.get("class_iou") or {}, labels),
        "pictures": _pictures(folder) if pictures else [],
        "changed_options": _changed_options(options),
        "all_options": json.dumps(options, indent=2, ensure_ascii=False),
        "provenance": _provenance(read_json_object(folder / "provenance.json"), result),
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    write_text(folder / NAME, template.render(facts))


def _summary(options: Mapping[str, Any], labels: LabelSpace) -> str:
    """Method, data set, backbone and seed in one line."""
    model, train = options["model"], options["train"]
    method = "frozen features" if train["frozen"] else options["training_coeff"]["loss"]
    return (
        f"{method} on {options['dataset']['data_type']}, {labels.n_classes} classes; {model['arch']}, "
        f"patch {model['pretrained']['dino_patch_size']}, {model['dim']} channels; seed {train['seed']}"
    )


def _results(rows: Sequence[Mapping[str, float]], result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows of the metrics table: the evaluated steps of a finished run, otherwise its validations."""
    table = []
    finished = "train_hours" in result
    if finished:
        for title, evaluated in (("best step", result), ("last step", result.get("last_step") or {})):
            for stage, words in STAGES.items():
                if metrics := evaluated.get(stage):
                    table.append((f"{title} ({evaluated['step']}), {words}", metrics))
    validations = [row for row in rows if any(name in row for name in METRICS)]
    if validations and not finished:
        best = max(validations, key=lambda row: sum(row.get(name, 0) for name in METRICS))
        table.append((f"best validation so far (step {best['iters']:.0f})", best))
    if validations and "last_step" not in result:
        table.append((f"last validation (step {validations[-1]['iters']:.0f})", validations[-1]))
    return [(title, [percent(metrics.get(name)) for name in METRICS]) for title, metrics in table]


def _charts(rows: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """The charts that have data; an axis is logarithmic only if all its values are positive."""
    charts = []
    for title, names, description, log in CURVES:
        lines = [line for line in (_line(rows, name) for name in names) if line["x"]]
        if lines:
            log = log and all(min(line["y"]) > 0 for line in lines)
            words = f"{description}, logarithmic" if log else description
            charts.append({"title": title, "description": words, "log": log, "lines": lines})
    return charts


def _line(rows: Sequence[Mapping[str, float]], name: str) -> dict[str, Any]:
    """The finite values of a scalar; each point of a long curve is a mean, placed at its last step."""
    points = sorted((row["iters"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan)))
    size = math.ceil(len(points) / MAX_POINTS)
    ends = range(len(points), 0, -size) if points else ()
    groups = [points[max(0, end - size) : end] for end in reversed(ends)]
    means = [sum(y for _, y in group) / len(group) for group in groups]
    return {
        "name": name,
        "x": [round(group[-1][0]) for group in groups],
        "y": [float(f"{mean:.6g}") for mean in means],
    }


def _class_iou(stages: Mapping[str, Any], labels: LabelSpace) -> list[dict[str, Any]]:
    """A panel per head: bars for the IoU before CRF and marks for the IoU after it."""
    before, after = (stages.get(stage) or {} for stage in STAGES)
    colours = dict(zip(labels.names, labels.palette, strict=True))
    panels = []
    for head, iou in before.items():
        refined = after.get(head, {})
        bars = [_bar(name, value, refined.get(name), colours[name]) for name, value in iou.items()]
        panels.append({"title": f"{head.capitalize()} probe", "bars": bars})
    return panels


def _bar(name: str, before: float | None, after: float | None, colour: Sequence[int]) -> dict[str, Any]:
    """A missing IoU (NaN, which is null in JSON) has no bar and no mark."""
    before, after = (math.nan if value is None else value for value in (before, after))
    return {
        "name": name,
        "colour": "rgb({}, {}, {})".format(*colour),
        "width": 0 if math.isnan(before) else round(before, 1),
        "mark": None if math.isnan(after) else round(after, 1),
        "text": percent(before) if math.isnan(after) else f"{percent(before)} → {percent(after)}",
    }


def _pictures(folder: Path) -> list[dict[str, str]]:
    """The figures in the folder, base64-encoded."""
    found = []
    for title, description in PICTURES.items():
        path = folder / f"{title.lower()}.png"
        if path.exists():
            png = base64.b64encode(path.read_bytes()).decode()
            found.append({"title": title, "description": description, "png": png})
    return found


def _changed_options(options: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Key, value and default of each option that differs from its default."""
    defaults = flatten(as_tree(Options()))
    return [
        (key, json.dumps(value, ensure_ascii=False), json.dumps(defaults.get(key), ensure_ascii=False))
        for key, value in flatten(options).items()
        if value != defaults.get(key)
    ]


def _provenance(provenance: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    versions = (provenance.get("versions") or {}).items()
    facts = {
        "git SHA": provenance.get("git_sha", "unknown"),
        "started": provenance.get("date", "unknown"),
        **{key: value for key, value in (provenance.get("hardware") or {}).items() if value is not None},
        "versions": ", ".join(f"{name} {version}" for name, version in versions),
    }
    if "train_hours" in result:
        facts["training"] = f"{60 * result['train_hours']:.1f} minutes"
        facts["peak memory"] = f"{result['peak_memory_gib']:.1f} GiB"
    return facts
