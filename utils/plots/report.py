"""report.html: a run on one page that needs nothing beside it, from the files of the run's folder."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from utils.config.loading import as_tree, flatten
from utils.config.options import Options
from utils.files import read_json_object, write_text
from utils.plots.charts import LEFT, RIGHT, bars, line_chart, line_of, table
from utils.plots.tables import METRICS, STAGES, read_scalars
from utils.vision.labels import LabelSpace

TEMPLATE = Path(__file__).with_suffix(".html")
NAME = "report.html"

CURVES = (  # title, scalars, what they are, logarithmic
    ("Loss", ("total_loss", "supcon_loss"), "supcon_loss is that of PPAP; the rest is the probes'", False),
    ("Probes", ("linear_loss", "cluster_loss"), "cross-entropy; minus cosine with a centroid", False),
    ("Metrics", METRICS, "percent, on the validation set, before CRF", False),
    ("Positives and negatives", ("num_positives", "num_negatives"), "patches an anchor; logarithmic", True),
    ("Boundaries", ("mean_phi", "mean_psi"), "Phi_T and Psi_T, means over anchors", False),
    ("Degree of propagation", ("mean_propagation",), "m_1 + ... + m_T, mean over anchors", False),
    ("Anchors without a positive", ("without_positives",), "share of the anchors drawn; no loss", False),
    ("Validation loss", ("valid_loss",), "cluster loss on the upsampled code", False),
    ("Gradient norm", ("grad_norm",), "of head and projection, before clipping", False),
    ("Parameter norm", ("param_norm",), "of head and projection", False),
    ("Pace", ("images_per_s",), "images a second, validations left out", False),
    ("GPU memory", ("gpu_memory_gib",), "peak in GiB", False),
)  # fmt: skip
PICTURES = {  # files, and what they show
    "predictions.png": "Images spread over the validation set; clusters take their matched class's colour.",
    "confusion.png": "Confusion before CRF: each row in percent of its true class.",
    "explanation.png": (
        "What propagation does for one anchor: similarities, sets and boundaries after t = 0..T relocations. "
        "It looks at frozen features alone, so it is the same all through a run."
    ),
}


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Attributes:
        name: of the run.
        state: how far it is, in a sentence.
        labels: class names and colours.
        options: the resolved options as a tree.
        provenance: what provenance.json holds.
        rows: the rows of metrics.csv, without empty cells.
        result: what metrics.json holds; while the run trains, the part of it that exists.
        pictures: (file, what it shows), PNG files that are put into the page.
    """

    name: str
    state: str
    labels: LabelSpace
    options: dict[str, Any]
    provenance: dict[str, Any]
    rows: Sequence[dict[str, float]]
    result: dict[str, Any]
    pictures: Sequence[tuple[Path, str]] = ()


def write_report(
    folder: Path, *, labels: LabelSpace, state: str, result: dict[str, Any], pictures: bool = True
) -> None:
    """Writes report.html of what the folder of a run holds.

    Args:
        folder: of the run; has options.json, provenance.json and, once there are scalars, metrics.csv.
        labels: class names and colours.
        state: how far the run is, in a sentence.
        result: see `Report`.
        pictures: whether those that are in the folder are put into the page.
    """
    there = [(folder / name, about) for name, about in PICTURES.items() if (folder / name).exists()]
    options = read_json_object(folder / "options.json")
    report = Report(
        name=options["wandb"]["name"],
        state=state,
        labels=labels,
        options=options,
        provenance=read_json_object(folder / "provenance.json"),
        rows=read_scalars(folder / "metrics.csv"),
        result=result,
        pictures=there if pictures else (),
    )
    write_text(folder / NAME, page(report))


def page(report: Report) -> str:
    """The page as HTML; whatever comes from a run is escaped."""
    sections = {
        "Results": _results(report),
        "Curves": _curves(report.rows),
        "IoU per class": _class_iou(report),
        "Pictures": "".join(_picture(path, about) for path, about in report.pictures),
        "Options": _options(report.options),
        "Provenance": _provenance(report),
    }
    shown = "\n".join(
        f"<section><h2>{title}</h2>\n{content}</section>" for title, content in sections.items() if content
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(report.name),
        about=escape(_about(report)),
        state=escape(report.state),
        sections=shown,
        left=LEFT,
        right=RIGHT,
    )


def _about(report: Report) -> str:
    """What is trained on what, in a line."""
    model, data, train = (report.options[section] for section in ("model", "dataset", "train"))
    backbone = f"{model['arch']}, patch {model['pretrained']['dino_patch_size']}"
    what = "frozen features" if train["frozen"] else report.options["training_coeff"]["loss"]
    return (
        f"{what} on {data['data_type']}, {report.labels.n_classes} classes; {backbone}, "
        f"{model['dim']} channels; seed {train['seed']}"
    )


def _results(report: Report) -> str:
    result, rows = report.result, []
    if "train_hours" in result:
        found = {f"best step ({result['step']})": result}
        if "last_step" in result:
            found[f"last step ({result['last_step']['step']})"] = result["last_step"]
        for title, each in found.items():
            rows += [
                [f"{title}, {words}", *_metrics(each[stage])]
                for stage, words in STAGES.items()
                if each[stage]
            ]
    validated = [row for row in report.rows if set(METRICS) & set(row)]
    if validated and "last_step" not in result:
        best = max(validated, key=lambda row: sum(row.get(name, 0) for name in METRICS))
        if "train_hours" not in result:
            rows.append([f"best validation so far (step {best['iters']:.0f})", *_metrics(best)])
        rows.append([f"last validation (step {validated[-1]['iters']:.0f})", *_metrics(validated[-1])])
    missing = result.get("after_crf_missing")
    note = f'<p class="soft">After CRF: {escape(missing)}</p>\n' if missing else ""
    if not rows:
        return (
            '<p class="soft">No metrics: there are no labelled validation images, or none was seen yet.</p>\n'
            + note
        )
    return table(["%", *(name.replace("_", " ") for name in METRICS)], rows) + note


def _metrics(found: dict[str, float]) -> list[str]:
    values = (found.get(name) for name in METRICS)
    return ["–" if value is None or not math.isfinite(value) else f"{value:.1f}" for value in values]


def _curves(rows: Sequence[dict[str, float]]) -> str:
    charts = (
        line_chart(title, [line_of(rows, name) for name in names], about=about, log=log)
        for title, names, about, log in CURVES
    )
    drawn = "\n".join(filter(None, charts))
    return f'<div class="grid-of">{drawn}</div>\n' if drawn else ""


def _class_iou(report: Report) -> str:
    """A panel a head: before CRF as bars, after CRF as marks."""
    stages = report.result.get("class_iou") or {}
    before, after = (stages.get(stage) or {} for stage in STAGES)
    colours = {
        name: f"rgb({red}, {green}, {blue})"
        for name, (red, green, blue) in zip(report.labels.names, report.labels.palette, strict=True)
    }
    panels = "".join(
        f'<div class="panel"><h3>{escape(head.capitalize())} probe</h3>'
        f"{bars(_numbers(iou), colours, then=_numbers(after.get(head) or {}))}</div>"
        for head, iou in before.items()
    )
    if not panels:
        return ""
    words = "Percent, in the colours of the data set" + ("; bar: before CRF, mark: after." if after else ".")
    return f'<p class="soft">{words}</p>\n<div class="grid-of">{panels}</div>\n'


def _numbers(iou: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in iou.items()}


def _picture(path: Path, about: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure class="picture"><figcaption>{escape(path.stem)}<small>{escape(about)}</small></figcaption>'
        f'<div class="scroll"><img alt="{escape(about)}" src="data:image/png;base64,{data}"></div></figure>\n'
    )


def _options(tree: dict[str, Any]) -> str:
    defaults, chosen = flatten(as_tree(Options())), flatten(tree)
    changed = [
        [key, json.dumps(value, ensure_ascii=False), json.dumps(defaults.get(key), ensure_ascii=False)]
        for key, value in chosen.items()
        if value != defaults.get(key)
    ]
    full = escape(json.dumps(tree, indent=2, ensure_ascii=False))
    return (
        table(["option", "value", "default"], changed, numbers=False)
        + f"<details><summary>All options (options.json, itself an option file)</summary>"
        f"<pre>{full}</pre></details>\n"
    )


def _provenance(report: Report) -> str:
    about, result = report.provenance, report.result
    hardware = {key: value for key, value in (about.get("hardware") or {}).items() if value is not None}
    rows = [
        ["git SHA", str(about.get("git_sha", "unknown"))],
        ["started", str(about.get("date", "unknown"))],
        *([key, str(value)] for key, value in hardware.items()),
        [
            "versions",
            ", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items()),
        ],
    ]
    if "train_hours" in result:
        rows.append(["training", f"{60 * result['train_hours']:.1f} minutes"])
        rows.append(["peak memory", f"{result['peak_memory_gib']:.1f} GiB"])
    return table(["", ""], rows, numbers=False)
