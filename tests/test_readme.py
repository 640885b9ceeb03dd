"""The README says what the code does: its options table, its option files and its commands."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from dataset import crop_datasets, dataset_download
from utils.config.cli import parse_arguments, plan_jobs
from utils.config.loading import REPOSITORY, find_option_file, load_options, option_table
from utils.download.sources import TARGETS

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def option_rows() -> list[str]:
    """The rows of the options table as the schema has them."""
    return [
        "| `{}` | `{}` | {} | {} |".format(key, json.dumps(default), text, allowed.replace("|", "\\|"))
        for key, default, text, allowed in option_table()
    ]


def test_options_table__is_the_schema():
    section = README.split("\n## Options\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == option_rows()


def commands():
    """Every `python run.py` or `python eval.py` in a code block or in the text."""
    found = re.findall(r"python (run|eval)\.py ([^\n`&]+)", README)
    return [(program, line.split("#")[0].strip()) for program, line in found]


@pytest.mark.parametrize(("program", "line"), sorted(set(commands())))
def test_commands__parse(program, line, tmp_path, monkeypatch):
    """Flags and keys exist and option files are there; placeholders stand for files that are."""
    (tmp_path / "w.pth").touch()
    line = line.replace("<weights>", str(tmp_path / "w.pth"))
    line = re.sub(r"<[a-z]+>", str(tmp_path), line)
    monkeypatch.setattr("utils.config.loading.missing_files", lambda options: [])
    jobs = plan_jobs(parse_arguments(shlex.split(line), description="", training=program == "run"))
    assert jobs


@pytest.mark.parametrize("line", sorted(set(re.findall(r"python dataset/([^\n`#&]+)", README))))
def test_preparation_commands__parse(line, tmp_path):
    """Programs, flags, data sets and option files exist; nothing is fetched or written."""
    program, *words = shlex.split(re.sub(r"<[a-z]+>", str(tmp_path), line))
    if program == "dataset_download.py":
        assert dataset_download.parse_arguments(words).target in TARGETS
    else:
        assert program == "crop_datasets.py"
        assert crop_datasets.chosen_options(crop_datasets.parse_arguments(words)).dataset.crop_type


def test_option_files__named_in_the_readme_exist_and_the_other_way_round():
    named = {name for name in re.findall(r"[a-z0-9_]+\.json", README) if name not in NOT_OURS}
    for name in named:
        load_options(find_option_file(name))
    ours = {path.name for path in (REPOSITORY / "json").rglob("*.json") if not path.stem.endswith("_eval")}
    assert ours - VARIANTS <= named
    assert all(name in README for name in VARIANTS)


VARIANTS = {"ablation.json"}
NOT_OURS = {
    "metrics.json",
    "options.json",
    "provenance.json",
    "classes.json",
    "other.json",
    "sweep.json",
    "sets.json",
    "left_out.json",
    "download.json",
    "crops.json",
    "explain.json",
    "legend.json",
    "names.json",
    *VARIANTS,
}


def test_quick_start__is_what_ci_runs():
    script = (REPOSITORY / ".ci/run").read_text()
    for words in ("python run.py --opt demo.json", "&& pytest"):
        assert f'command_from_readme "{words}"' in script
        assert sum(line.startswith("pip install") and words in line for line in README.splitlines()) == 1


def test_own_parts__train_as_the_readme_says(tmp_path):
    """The example is run as it stands: a data set, a backbone and a loss of one's own."""
    section = README.split("\n## Your own data set, backbone or loss\n")[1].split("\n## ")[0]
    (tmp_path / "mine.py").write_text(section.split("```python\n")[1].split("```")[0])
    (command,) = re.findall(r"python mine\.py ([^\n]+)", section)
    quick = [
        "train.epoch=2",
        "eval.is_crf=false",
        f"output_dir={tmp_path}",
        "dataset.res=64",
        "dataset.val_res=64",
    ]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "mine.py"), *shlex.split(command), *quick],
        capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": "."}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "mine/metrics.json").read_text())
    assert list(metrics["class_iou"]["before_crf"]["cluster"]) == ["rows", "columns"]
    assert metrics["images"] == 64
    with (tmp_path / "mine/metrics.csv").open() as file:
        losses = [float(row["supcon_loss"]) for row in csv.DictReader(file) if row["supcon_loss"]]
    assert all(0 < loss < 20 for loss in losses)


def test_results__are_filled_in():
    assert not re.search(r"@[A-Z]+@", README)


def test_pictures__are_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (REPOSITORY / path).is_file()
