"""Writes report.html: a self-contained page about one run, from its files, or about a sweep."""

import base64
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.config.loading import as_tree, flatten
from utils.config.options import FROZEN, Options
from utils.files import make_folder, read_json_object, write_json, write_text
from utils.plots.figures import draw_sweep
from utils.plots.tables import COST_TITLES, METRIC_TITLES, METRICS, STAGES, markdown, percent, sweep_rows
from utils.vision.labels import LabelSpace

NAME = "report.html"
STRIPS, MAX_STRIPS = "validations", 8  # folder of small pictures, and how many of them are shown
MAX_POINTS = 300  # per curve; longer curves are averaged
LOSSES = ("supcon_loss", "stego_loss", "hp_loss", "consistency_loss")  # of the methods
CURVES = (  # title, scalars, description, whether the axis is logarithmic
    ("Loss", ("total_loss", *LOSSES), "total_loss = losses of the method and of the probes", False),
    ("Pairs of STEGO", ("self_loss", "knn_loss", "rand_loss"), "before weighting", False),
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
# of each run, in sweep.json
OF_SWEEP = ("name", "step", *STAGES, "train_hours", "step_seconds", "trainable_parameters", "checkpoint")
PICTURES = {  # title -> description; the files are predictions.png, ...; the baseline's is in its folder
    "Predictions": "Images from across the set; with labels, a matched cluster has the colour of its class.",
    "Confusion": "Before CRF; each row in percent of its true class.",
    "Explanation": "Propagation for one anchor: similarities, sets and boundaries after t = 0..T "
    "relocations. It depends only on the frozen features and is the same throughout a run.",
    "Frozen baseline": "The same images without training of the head, for comparison.",
}


def write_report(
    folder: Path, *, labels: LabelSpace, state: str, result: Mapping[str, Any], pictures: bool = True
) -> None:
    """Writes report.html into the folder of a run, from its options.json, provenance.json and metrics.csv.

    `state` is a sentence about the progress of the run, `result` the content of metrics.json as far as it is
    known, and `pictures` whether to embed the PNG figures in the folder.
    """
    options, defaults = flatten(read_json_object(folder / "options.json")), flatten(as_tree(Options()))
    scalars = read_scalars(folder / "metrics.csv")
    provenance = flatten(read_json_object(folder / "provenance.json"))
    provenance |= {key: f"{result[key]:.2f}" for key in ("train_hours", "peak_memory_gib") if key in result}
    figures, steps = {}, {"step": result, "last step": result.get("last_step") or {}}
    if pictures:
        frozen = folder.with_name(f"{folder.name}{FROZEN}")
        figures = {title: folder / f"{title.lower()}.png" for title in PICTURES}
        figures["Frozen baseline"] = frozen / "predictions.png"
        if (baseline := frozen / "metrics.json").exists():
            steps["frozen baseline, step"] = read_json_object(baseline)
    method = "frozen" if options["train.frozen"] else options["method"]
    page = render(
        NAME,
        options=options,
        trained=options["training_coeff.loss"] if method == "ppap" else method,
        defaults=defaults,
        state=state,
        metrics=METRIC_TITLES,
        results=[
            (f"{title} {step['step']}, {words}", [percent(metrics.get(name)) for name in METRICS])
            for title, step in steps.items()
            for stage, words in STAGES.items()
            if (metrics := step.get(stage))
        ],
        shares=result.get("cluster_shares"),
        after_crf_missing=result.get("after_crf_missing"),
        charts=_charts(scalars),
        colours=dict(zip(labels.names, labels.palette, strict=True)),
        heads=_class_iou(result.get("class_iou") or {}),
        pictures=[
            (title, PICTURES[title], embedded(path)) for title, path in figures.items() if path.exists()
        ],
        strips=_strips(folder / STRIPS),
        provenance=provenance,
    )
    write_text(folder / NAME, page)


def write_sweep(folder: Path, results: Sequence[tuple[str, dict[str, Any]]], *, title: str) -> None:
    """Writes the files of a sweep from (setting, result) of each run; runs are linked by their `name`."""
    make_folder(folder)
    runs = [{"setting": setting} | {key: result.get(key) for key in OF_SWEEP} for setting, result in results]
    write_json(folder / "sweep.json", runs)
    rows, header = sweep_rows(results), ["setting", "runs", *METRIC_TITLES, *COST_TITLES]
    write_text(folder / "sweep.md", markdown(header, rows) + "\n")
    stages = [(setting, result["before_crf"]) for setting, result in results if result["before_crf"]]
    scored = [(setting, {name: m[name] for name in METRICS if name in m}) for setting, m in stages]
    if scored:
        draw_sweep(folder / "sweep.png", scored)
    figure = embedded(folder / "sweep.png") if scored else None
    linked = [run for run in runs if run["name"] and (folder.parent / run["name"] / NAME).exists()]
    page = render("sweep.html", title=title, header=header, rows=rows, figure=figure, runs=linked)
    write_text(folder / NAME, page)


def _strips(folder: Path) -> list[tuple[str, str]]:
    """Title and picture of the photographs and of up to `MAX_STRIPS` validations, the last one included."""
    steps = sorted(folder.glob("[0-9]*.png"))
    last, count = len(steps) - 1, min(MAX_STRIPS, len(steps))
    chosen = [steps[round(k * last / max(1, count - 1))] for k in range(count)]
    titled = [(f"step {int(path.stem):,}", embedded(path)) for path in chosen]
    return [("images", embedded(folder / "photographs.png")), *titled] if titled else []


def render(template: str, **content: Any) -> str:
    """A page from a template beside this file."""
    how = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **how)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment.get_template(template).render(**content)


def embedded(path: Path) -> str:
    """A PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def read_scalars(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv without their empty cells."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]


def _charts(rows: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """The charts that have data; an axis is logarithmic only if all its values are positive."""
    charts = []
    for title, names, description, log in CURVES:
        lines = [line for line in (_line(rows, name) for name in names) if line["x"]]
        log = log and all(min(line["y"]) > 0 for line in lines)
        charts.append({"title": title, "description": description, "log": log, "lines": lines})
    return [chart for chart in charts if chart["lines"]]


def _line(rows: Sequence[Mapping[str, float]], name: str) -> dict[str, Any]:
    """The finite values of a scalar; each point of a long curve is a mean, placed at its last step."""
    points = sorted((row["iters"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan)))
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [sum(y for _, y in group) / len(group) for group in groups]
    x, y = [round(group[-1][0]) for group in groups], [float(f"{mean:.6g}") for mean in means]
    return {"name": name, "x": x, "y": y}


def _class_iou(stages: Mapping[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
    """Head -> class name, IoU before CRF and IoU after it; '-' if missing."""
    before, after = (stages.get(stage) or {} for stage in STAGES)
    return {
        head: [(name, percent(value), percent(after.get(head, {}).get(name))) for name, value in iou.items()]
        for head, iou in before.items()
    }
