import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from utils.config.loading import as_tree
from utils.plots.report import MAX_POINTS, write_report
from utils.vision.labels import LabelSpace

VOID = {"meta", "img"}  # have no end tag
FOUR = {"Cluster_Accuracy": 50.0, "Cluster_mIoU": 20.0, "Linear_Accuracy": 80.0, "Linear_mIoU": 40.0}
EVIL = '</script><script>alert("x")</script>'
LABELS = LabelSpace((EVIL, "road"), ((255, 255, 255), (0, 0, 0)))


class Checker(HTMLParser):
    """Checks that a page is well-formed, escaped and self-contained; `seen` are its tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert self.open == []
        assert not re.search(r"https?://|url\(|@import", text)
        assert EVIL not in text
        assert self.seen.count("script") == 2  # data and drawing

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith("data:image/png;base64,")
        assert tag not in ("link", "iframe", "object", "base")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def written(folder, **arguments):
    """The checked page as text, and its tags."""
    write_report(folder, **{"labels": LABELS, "state": "Finished", "result": finished()} | arguments)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Checker(text).seen


def charts_of(text):
    """The embedded data of the curves, by title."""
    (data,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', text)
    return {chart["title"]: chart for chart in json.loads(data)}


@pytest.fixture
def folder(tmp_path, tiny_options):
    """The folder of a run with hostile strings wherever a user can put one."""
    tree = as_tree(tiny_options())
    tree["wandb"]["name"] = tree["wandb"]["notes"] = EVIL
    (tmp_path / "options.json").write_text(json.dumps(tree))
    about = {"git_sha": EVIL, "versions": {"torch": "2"}, "hardware": {"cpu": EVIL, "gpu": None}}
    (tmp_path / "provenance.json").write_text(json.dumps(about))
    rows = ["iters,total_loss,Cluster_mIoU,num_positives,num_negatives"]
    rows += ["1,3.5,,8,900", "2,nan,,9,800", "3,2.5,20.5,7,850"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    Image.new("RGB", (4, 4)).save(tmp_path / "confusion.png")
    return tmp_path


def finished(**changes):
    iou = {"cluster": {EVIL: 10.0, "road": None}}  # None: NaN in JSON
    return {
        "step": 3,
        "before_crf": FOUR,
        "after_crf": {name: value + 1 for name, value in FOUR.items()},
        "after_crf_missing": None,
        "class_iou": {"before_crf": iou, "after_crf": {"cluster": {EVIL: 12.0, "road": math.nan}}},
        "train_hours": 0.5,
        "peak_memory_gib": 1.0,
    } | changes


def test_report__finished_run(folder):
    text, seen = written(folder, state=EVIL, result=finished(last_step=finished(step=9, after_crf=None)))
    assert (seen.count("svg"), seen.count("img")) == (3, 1)
    for words in ("step 3, after CRF", "last step 9, before CRF", "51.0", "train_hours", "10.0 → 12.0"):
        assert words in text


@pytest.mark.parametrize("method", ["ppap", "stego", "frozen"])
def test_report__names_the_method(folder, method):
    tree = json.loads((folder / "options.json").read_text()) | {"method": method}
    (folder / "options.json").write_text(json.dumps(tree))
    text, _ = written(folder, state="", result=finished())
    assert f"{'frozen features' if method == 'frozen' else method} on" in text


def test_report__curves_are_embedded_without_gaps(folder):
    charts = charts_of(written(folder)[0])
    assert charts["Loss"]["lines"] == [{"name": "total_loss", "x": [1, 3], "y": [3.5, 2.5]}]
    assert charts["Metrics"]["lines"] == [{"name": "Cluster_mIoU", "x": [3], "y": [20.5]}]
    assert charts["Positives and negatives"]["log"]
    (folder / "metrics.csv").write_text("iters,num_positives\n1,8\n2,0")
    assert not charts_of(written(folder)[0])["Positives and negatives"]["log"]  # because of the zero


def test_report__long_curve_is_averaged(folder):
    (folder / "metrics.csv").write_text("iters,grad_norm\n" + "\n".join(f"{k},{k}" for k in range(5000)))
    (line,) = charts_of(written(folder)[0])["Gradient norm"]["lines"]
    assert len(line["x"]) <= MAX_POINTS
    assert (line["x"][0], line["y"][0]) == (16, 8)  # means of 17 points
    assert (line["x"][-1], line["y"][-1]) == (4999, 4998.5)  # 5000 = 294 * 17 + 2


def test_report__without_labels_or_scalars(folder):
    (folder / "metrics.csv").unlink()
    nothing = finished(before_crf=None, after_crf=None, after_crf_missing="no labels", class_iou={})
    text, seen = written(folder, result=nothing)
    assert "No metrics" in text
    assert "After CRF: no labels" in text
    assert "svg" not in seen


def test_report__draws_its_curves_in_a_browser(folder, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    written(folder)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [browser, *flags, "--enable-logging=stderr", "--dump-dom", (folder / "report.html").as_uri()],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<polyline") == 4
    assert "total_loss <b>2.5</b>" in done.stdout
