import json
import math
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from utils.config.loading import as_tree
from utils.plots.report import write_report
from utils.plots.tables import read_scalars
from utils.vision.labels import LabelSpace

VOID = {"meta", "img", "br", "line", "circle", "polyline"}  # have no end tag, or end themselves
FOUR = {"Cluster_Accuracy": 50.0, "Cluster_mIoU": 20.0, "Linear_Accuracy": 80.0, "Linear_mIoU": 40.0}
EVIL = '<script>alert("x")</script>'
LABELS = LabelSpace((EVIL, "road"), ((255, 255, 255), (0, 0, 0)))


class Checker(HTMLParser):
    """Every tag is closed in order, and nothing is fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.scripts = [], [], 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith("data:image/png;base64,")
        assert tag not in ("link", "iframe", "object", "base")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(text):
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert EVIL not in text
    checked = Checker(text)
    assert checked.seen.count("script") == 1  # our own
    return checked


@pytest.fixture
def folder(tmp_path, tiny_options):
    """Of a run whose every word is an attack."""
    tree = as_tree(tiny_options())
    tree["wandb"]["name"] = tree["wandb"]["notes"] = EVIL
    (tmp_path / "options.json").write_text(json.dumps(tree))
    about = {"git_sha": EVIL, "versions": {"torch": "2"}, "hardware": {"cpu": EVIL, "gpu": None}}
    (tmp_path / "provenance.json").write_text(json.dumps(about))
    rows = ["iters,total_loss,Cluster_mIoU", "1,3.5,", "2,nan,", "3,2.5,20.5"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    Image.new("RGB", (4, 4)).save(tmp_path / "confusion.png")
    return tmp_path


def finished(**changes):
    iou = {"cluster": {EVIL: 10.0, "road": None}}  # None: NaN as JSON has it
    return {
        "step": 3,
        "before_crf": FOUR,
        "after_crf": {name: value + 1 for name, value in FOUR.items()},
        "after_crf_missing": None,
        "class_iou": {"before_crf": iou, "after_crf": {"cluster": {EVIL: 12.0, "road": math.nan}}},
        "train_hours": 0.5,
        "peak_memory_gib": 1.0,
    } | changes


def test_page__of_a_finished_run_is_whole_and_escaped(folder):
    write_report(folder, labels=LABELS, state=EVIL, result=finished())
    text = (folder / "report.html").read_text(encoding="utf-8")
    seen = check(text).seen
    assert (seen.count("svg"), seen.count("img")) == (2, 1)
    for words in ("best step (3), after CRF", "51.0", "30.0 minutes", "10.0 → 12.0", "dataset.data_type"):
        assert words in text
    assert not (folder / "report.html.part").exists()


def test_page__of_a_run_that_trains_has_no_pictures(folder):
    running = {"step": 3, "before_crf": FOUR, "class_iou": {"before_crf": {}}}
    write_report(folder, labels=LABELS, state="Training", result=running, pictures=False)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "best validation so far (step 3)" in text
    assert "img" not in check(text).seen


def test_page__without_labels_or_scalars(folder):
    (folder / "metrics.csv").unlink()
    nothing = finished(before_crf=None, after_crf=None, after_crf_missing="no labels", class_iou={})
    write_report(folder, labels=LABELS, state="Finished", result=nothing)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "No metrics" in text
    assert "After CRF: no labels" in text
    assert "svg" not in check(text).seen


def test_page__last_step_has_rows_of_its_own(folder):
    last = finished(step=9, after_crf=None)
    write_report(folder, labels=LABELS, state="Finished", result=finished(last_step=last))
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "last step (9), before CRF" in text
    assert "last validation" not in text


def test_read_scalars__leaves_out_empty_cells(folder):
    rows = read_scalars(folder / "metrics.csv")
    assert rows[0] == {"iters": 1.0, "total_loss": 3.5}
    assert rows[2] == {"iters": 3.0, "total_loss": 2.5, "Cluster_mIoU": 20.5}


def test_page__opens_in_a_browser_without_a_message(folder, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    write_report(folder, labels=LABELS, state="Finished", result=finished())
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [browser, *flags, "--enable-logging=stderr", "--dump-dom", (folder / "report.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert "best step (3), after CRF" in done.stdout
