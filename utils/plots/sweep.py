"""The files of a sweep: sweep.json, sweep.md, sweep.png and report.html."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.files import make_folder, write_json, write_text
from utils.plots.figures import draw_sweep
from utils.plots.report import embedded, render
from utils.plots.tables import COST_TITLES, METRIC_TITLES, METRICS, STAGES, markdown, sweep_rows

KEPT = ("name", "step", *STAGES, "train_hours", "step_seconds", "trainable_parameters", "checkpoint")


def write_sweep(folder: Path, results: Sequence[tuple[str, dict[str, Any]]], *, title: str) -> None:
    """Writes the files of a sweep from (setting, result) of each run; runs are linked by their `name`."""
    make_folder(folder)
    runs = [{"setting": setting} | {key: result.get(key) for key in KEPT} for setting, result in results]
    write_json(folder / "sweep.json", runs)
    rows, header = sweep_rows(results), ["setting", "runs", *METRIC_TITLES, *COST_TITLES]
    write_text(folder / "sweep.md", markdown(header, rows) + "\n")
    stages = [(setting, result["before_crf"]) for setting, result in results if result["before_crf"]]
    scored = [(setting, {name: m[name] for name in METRICS if name in m}) for setting, m in stages]
    if scored:
        draw_sweep(folder / "sweep.png", scored)
    figure = embedded(folder / "sweep.png") if scored else None
    linked = [run for run in runs if run["name"] and (folder.parent / run["name"] / "report.html").exists()]
    page = render("sweep.html", title=title, header=header, rows=rows, figure=figure, runs=linked)
    write_text(folder / "report.html", page)
