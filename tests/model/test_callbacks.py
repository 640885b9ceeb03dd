"""A run with wandb, as its server sees it, and its report.html."""

import csv
import json
from unittest.mock import Mock

import pytest

import run
from model import callbacks
from tests.utils.wandb_server import wandb_server  # noqa: F401
from utils.errors import Interrupted

KEY = "k" * 40  # of `wandb_server`
METRICS = {"Cluster_Accuracy", "Cluster_mIoU", "Linear_Accuracy", "Linear_mIoU"}
SCALARS = {
    "epoch", "iters", "train_loss", "supcon_loss", "net_lr", "param_norm", "grad_norm", "num_positives",
    "num_negatives", "total_loss", "linear_loss", "cluster_loss", "mean_phi", "mean_psi", "mean_propagation",
    "without_positives",
}  # fmt: skip


def test_run__is_in_wandb_and_in_metrics_csv(tiny_file, tmp_path, wandb_server):  # noqa: F811
    """A run of 8 steps, validated at 3, 4, 7 and 8, with images after each."""
    chosen = {"wandb__tags": ["a tag"], "wandb__notes": "notes", "wandb__id": "abc", "wandb__mode": "online"}
    chosen |= {"train__epoch": 2, "train__print_freq": 1, "eval__pictures": 2}
    run.main(["--opt", tiny_file(**chosen)])
    recorded = tmp_path / "output/tiny"
    metrics = json.loads((recorded / "metrics.json").read_text())
    check_history(wandb_server.history("abc"), best=metrics["step"])
    check_summary(wandb_server.summary, metrics)
    given, config = wandb_server.given[0], json.loads(wandb_server.given[0]["config"])
    assert (given["tags"], given["notes"]) == (["a tag"], "notes")
    assert config["training_coeff"]["value"]["prop_iter"] == 2
    assert config["git_sha"]["value"] == json.loads((recorded / "provenance.json").read_text())["git_sha"]
    (copies,) = recorded.glob("wandb/run-*/files")
    for name in ("options.json", "provenance.json", "metrics.json", "report.html"):
        assert name in wandb_server.files
        assert (copies / name).is_file()
        assert not (copies / name).is_symlink()
    with (recorded / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == SCALARS | METRICS | {"images_per_s", "valid_loss", "step"}
    losses = [float(row["total_loss"]) for row in rows if row["total_loss"]]
    logged = [row["total_loss"] for row in wandb_server.history("abc") if "total_loss" in row]
    assert losses == pytest.approx(logged)
    for path in recorded.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_resume__behind_the_last_step_still_sends_the_pictures(tiny_file, monkeypatch, wandb_server):  # noqa: F811
    words = ["--opt", tiny_file(wandb__mode="online", wandb__id="abc", train__epoch=2, eval__pictures=2)]
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.HtmlReport, "finish", Mock(side_effect=Interrupted(143)))
        with pytest.raises(Interrupted):
            run.main(words)
    (result,) = run.main([*words, "--resume"])
    pictures = [row["iters"] for row in wandb_server.history("abc") if "predictions" in row]
    assert pictures == [result["step"]]


def check_history(history, *, best):
    """No point is lost to the images, and the final pictures belong to the best step."""
    steps = [row for row in history if "total_loss" in row]
    assert [row["iters"] for row in steps] == list(range(1, 9))
    assert all(set(row) >= SCALARS for row in steps)
    validations = [row for row in history if "valid_loss" in row]
    assert [row["iters"] for row in validations] == [3, 4, 7, 8]
    assert all(set(row) >= METRICS for row in validations)
    images = [row for row in history if "validation/predictions" in row]
    assert [row["iters"] for row in images] == [3, 4, 7, 8]
    for row in images:
        shown = row["validation/predictions"]
        assert shown["count"] == len(shown["captions"]) == 2
        for masks in shown["all_masks"]:
            assert set(masks) == {"truth", "clusters", "linear probe"}
        assert {f"iou_{head}/plain" for head in ("cluster", "linear")} <= set(row)
    for name in ("predictions", "confusion", "class_iou", "explanation"):
        assert [row["iters"] for row in history if name in row] == [best]


def check_summary(summary, metrics):
    assert summary["best_step"] == metrics["step"]
    for name in METRICS:
        assert summary[f"best_{name}"] == pytest.approx(metrics["before_crf"][name])
        assert summary[f"best_{name}_crf"] == pytest.approx(metrics["after_crf"][name])
    assert summary["train_hours"] == pytest.approx(metrics["train_hours"])


def test_artifact__is_the_best_checkpoint(tmp_path):
    (tmp_path / "best.ckpt").touch()
    run = Mock(id="a=b", step=8, starting_step=0)
    callbacks.WandbImages([run], []).finish({"step": 8}, folder=tmp_path, artifact=tmp_path / "best.ckpt")
    (artifact,) = run.log_artifact.call_args.args
    assert (artifact.type, artifact.name) == ("model", "a_b-best")
    assert list(artifact.manifest.entries) == ["best.ckpt"]


def test_flags__that_switch_wandb_off(tiny_file, tmp_path, monkeypatch, no_figures):
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("wandb was started"))
    for flag in ("--debug", "--test"):
        run.main(["--opt", tiny_file(wandb__mode="online"), flag, "eval.is_crf=false"])
    assert not list((tmp_path / "output").rglob("wandb"))


def test_report__is_updated_during_training_and_changes_nothing(tiny_file, tmp_path, monkeypatch):
    pages, write = [], callbacks.write_report

    def noted(folder, **arguments):
        write(folder, **arguments)
        pages.append((folder / "report.html").read_text(encoding="utf-8"))

    monkeypatch.setattr(callbacks, "write_report", noted)
    (result,) = run.main(["--opt", tiny_file(eval__pictures=2), "eval.is_crf=false"])
    assert ["step 3 of 4" in pages[0], "step 4 of 4" in pages[1], "Finished" in pages[2]] == [True] * 3
    strips = [2, 3, 3]  # photographs and the clusters of each validation
    pictures = [0, 0, 3]  # predictions, confusion, explanation
    found = [page.count("data:image/png") for page in pages]
    assert found == [a + b for a, b in zip(strips, pictures, strict=True)]
    (plain,) = run.main(["--opt", tiny_file(), "eval.is_crf=false"])
    assert not (tmp_path / "output/tiny/explanation.png").exists()
    assert result["valid_loss"] == plain["valid_loss"]


@pytest.mark.parametrize(
    ("words", "explained"),
    [
        (["train.frozen=true"], False),
        (["dataset.cache_features=ram", "wandb.mode=offline"], True),  # the evaluator sees no photograph
    ],
)
def test_run__of_every_kind_has_a_report(tiny_file, tmp_path, no_figures, words, explained):
    run.main(["--opt", tiny_file(eval__pictures=1), "eval.is_crf=false", *words])
    (page,) = (tmp_path / "output").glob("*/report.html")
    assert "Finished" in page.read_text(encoding="utf-8")
    assert (page.parent / "explanation.png").exists() == explained


def test_pictures__their_errors_do_not_end_the_run(tiny_file, tmp_path, monkeypatch, capsys):
    def refuse(*_arguments, **_keywords):
        raise OSError(28, "No space left on device")

    for place in ("callbacks.attach", "callbacks.write_strip", "callbacks.draw_explanation"):
        monkeypatch.setattr(f"model.{place}", refuse)
    for name in ("draw_confusion", "draw_class_iou", "draw_predictions"):
        monkeypatch.setattr(f"model.results.{name}", refuse)
    run.main(["--opt", tiny_file(wandb__mode="offline", eval__pictures=1), "eval.is_crf=false"])
    folder, lines = tmp_path / "output/tiny", capsys.readouterr().out.splitlines()
    assert (folder / "report.html").exists()
    for name in ("validations", "explanation.png", "confusion.png", "class_iou.png", "predictions.png"):
        assert any(line.startswith(f"{folder / name}: OSError: ") for line in lines)
    assert any(line.startswith("wandb: OSError: ") for line in lines)
