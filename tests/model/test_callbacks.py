"""A run with wandb offline, read back from what wandb has written, and its report.html."""

import csv
import json

import pytest

import run
from model import callbacks as dashboard
from model.callbacks import Allowance, checkpoint_artifact, summary_of
from tests.utils.plots.test_report import check
from tests.utils.wandb_file import WandbFile
from utils.plots.wandb_media import confusion_table
from utils.vision.labels import LabelSpace

KEY = "0123456789abcdef0123456789abcdef01234567"  # a key as wandb's look
FOUR = {"Cluster_Accuracy", "Cluster_mIoU", "Linear_Accuracy", "Linear_mIoU"}
STEP = {"epoch", "iters", "train_loss", "supcon_loss", "net_lr", "param_norm", "grad_norm", "num_positives"}
STEP |= {"num_negatives", "total_loss", "linear_loss", "cluster_loss", "mean_phi", "mean_psi"}
STEP |= {"mean_propagation", "without_positives"}


@pytest.fixture
def recorded(tiny_file, tmp_path, monkeypatch):
    """The folder of a run of 8 steps, validated at 3, 4, 7 and 8."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    changed = {"wandb__tags": ["a tag"], "wandb__notes": "notes", "wandb__id": "abc", "wandb__artifact": True}
    path = tiny_file(wandb__mode="offline", train__epoch=2, train__print_freq=1, **changed)
    run.main(["--opt", path])
    return tmp_path / "output/tiny"


def test_run__is_in_wandb_in_metrics_csv_and_on_its_page(recorded):
    read, metrics = WandbFile(recorded), json.loads((recorded / "metrics.json").read_text())
    check_history(read)
    check_summary(read, metrics)
    assert read.run.run_id == "abc"
    assert list(read.run.tags) == ["a tag"]
    assert read.run.notes == "notes"
    assert read.config["training_coeff"]["prop_iter"] == 2
    assert read.config["git_sha"] == json.loads((recorded / "provenance.json").read_text())["git_sha"]
    attached = {"options.json", "provenance.json", "metrics.json", "report.html"}
    assert attached <= read.files
    assert all((read.path.parent / "files" / name).is_file() for name in attached)
    assert not any(path.is_symlink() for path in (read.path.parent / "files").iterdir())
    (best,) = [artifact for artifact in read.artifacts if artifact.type == "model"]
    assert [entry.path for entry in best.manifest.contents] == ["best.ckpt"]
    check_csv(recorded, read)
    check_page(recorded, metrics)
    for path in recorded.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def check_history(read):
    steps = [row for row in read.history if "total_loss" in row]
    assert [row["iters"] for row in steps] == list(range(1, 9))
    assert all(set(row) >= STEP for row in steps)
    assert all("images_per_s" in row for row in steps[1:])
    validations = [row for row in read.history if "valid_loss" in row]
    assert [row["iters"] for row in validations] == [3, 4, 7, 8]
    assert all(set(row) >= FOUR for row in validations)
    tables = [row for row in read.history if "validation/predictions/path" in row]
    assert tables[0]["iters"] == 3  # the first, and the last
    assert tables[-1]["iters"] == 8
    for row in tables:
        assert (row["validation/predictions/nrows"], row["validation/predictions/ncols"]) == (2, 5)
        for head in ("cluster", "linear"):
            table = json.loads(
                (read.path.parent / "files" / row[f"validation/confusion_{head}/path"]).read_text()
            )
            assert [line[0] for line in table["data"]][:2] == ["plain", "rows"]
            assert all(
                sum(line[1:]) == pytest.approx(100, abs=0.1) or not sum(line[1:]) for line in table["data"]
            )
    assert [row["iters"] for row in read.history if "explanation/path" in row] == [8]
    contents = {
        entry.path for artifact in read.artifacts if "predictions" in artifact.name
        for entry in artifact.manifest.contents
    }  # fmt: skip
    assert sum("mask" in path for path in contents) >= 6  # truth, clusters, linear probe of two images


def check_summary(read, metrics):
    assert read.summary["best_step"] == metrics["step"]
    for name in FOUR:
        assert read.summary[f"best_{name}"] == pytest.approx(metrics["before_crf"][name])
        assert read.summary[f"best_{name}_crf"] == pytest.approx(metrics["after_crf"][name])
    assert read.summary["train_hours"] == pytest.approx(metrics["train_hours"])


def check_csv(recorded, read):
    with (recorded / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == STEP | FOUR | {"images_per_s", "valid_loss", "step"}
    losses = [float(row["total_loss"]) for row in rows if row["total_loss"]]
    assert losses == pytest.approx([row["total_loss"] for row in read.history if "total_loss" in row])


def check_page(recorded, metrics):
    text = (recorded / "report.html").read_text(encoding="utf-8")
    seen = check(text).seen
    assert seen.count("img") == 3  # predictions, confusion, explanation
    assert seen.count("svg") == 11  # all curves but that of a GPU
    assert f"best step ({metrics['step']}), after CRF" in text


@pytest.mark.parametrize("flag", ["--debug", "--test"])
def test_flags__that_switch_wandb_off(tiny_file, tmp_path, monkeypatch, flag):
    run.main(["--opt", tiny_file(), "eval.is_crf=false"])
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("wandb was started"))
    run.main(["--opt", tiny_file(wandb__mode="online"), flag, "eval.is_crf=false"])
    assert not list((tmp_path / "output").rglob("wandb"))


def test_page__is_kept_up_to_date_while_a_run_trains(tiny_file, tmp_path, monkeypatch):
    pages, write = [], dashboard.write_report

    def noted(folder, **arguments):
        write(folder, **arguments)
        pages.append((folder / "report.html").read_text(encoding="utf-8"))

    monkeypatch.setattr(dashboard, "write_report", noted)
    run.main(["--opt", tiny_file(), "eval.is_crf=false"])
    assert ["step 3 of 4" in pages[0], "step 4 of 4" in pages[1], "Finished" in pages[2]] == [True] * 3
    assert "<img" not in pages[0]
    assert "Cluster probe" in pages[0]


@pytest.mark.parametrize(
    "words",
    [
        ["train.frozen=true"],
        ["eval.pictures=0"],
        ["dataset.cache_features=ram", "wandb.mode=offline"],  # the evaluator sees no photograph
    ],
)
def test_run__of_every_kind_has_a_page(tiny_file, tmp_path, words):
    run.main(["--opt", tiny_file(), "eval.is_crf=false", *words])
    (page,) = (tmp_path / "output").glob("*/report.html")
    check(page.read_text(encoding="utf-8"))
    assert (page.parent / "explanation.png").exists() == ("wandb.mode=offline" in words)


def test_explanation__made_between_two_steps_changes_no_result(tiny_file, tmp_path, monkeypatch):
    """A long run has it made after a validation, in inference mode; a short one at its end."""
    made, draw = [], dashboard.draw_explanation
    monkeypatch.setattr(dashboard, "draw_explanation", lambda *a, **k: (made.append(1), draw(*a, **k)))
    results = []
    for seconds in (1e9, 0.0):
        monkeypatch.setattr(dashboard, "EXPLAIN_SECONDS", seconds)
        results += run.main(["--opt", tiny_file(train__epoch=2), "eval.is_crf=false"])
    assert len(made) == 2  # once a run
    assert results[0]["valid_loss"] == results[1]["valid_loss"]
    pictures = [(tmp_path / f"output/{name}/explanation.png").read_bytes() for name in ("tiny", "tiny.1")]
    assert pictures[0] == pictures[1]


def test_finish__a_mistake_of_wandb_does_not_lose_the_results(tiny_file, tmp_path, monkeypatch, capsys):
    def refuse(*_arguments, **_keywords):
        raise dashboard.wandb.errors.CommError("no room left")

    monkeypatch.setattr(dashboard, "attach", refuse)
    monkeypatch.setattr(dashboard, "prediction_table", refuse)
    run.main(["--opt", tiny_file(wandb__mode="offline"), "eval.is_crf=false"])
    assert (tmp_path / "output/tiny/report.html").exists()
    assert "wandb: no room left; the run goes on without" in capsys.readouterr().out


def test_allowance__is_a_share_of_the_time_since(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(dashboard.time, "perf_counter", lambda: now[0])
    allowance = Allowance(0.01, 4.0)
    now[0] = 399.0
    assert not allowance.due()
    now[0] = 400.0
    assert allowance.due()
    with allowance:
        now[0] = 401.0  # it takes a second
    assert not allowance.due()
    now[0] = 501.0
    assert allowance.due()


def test_summary__without_labels_has_no_metrics(tmp_path):
    assert summary_of({"step": 4, "before_crf": None, "after_crf": None}) == {"best_step": 4}
    (tmp_path / "best.ckpt").write_text("weights")
    assert checkpoint_artifact(tmp_path / "best.ckpt", "a run", result={"step": 4}).name == "a_run-best"


def test_confusion_table__a_class_without_a_pixel_and_odd_names():
    import numpy as np

    labels = LabelSpace(("true class", "unmatched"), ((0, 0, 0), (1, 1, 1)))
    table = confusion_table(np.array([[3, 1, 0], [0, 0, 0]]), labels)
    assert table.data == [["true class", 75.0, 25.0, 0.0], ["unmatched", 0.0, 0.0, 0.0]]
