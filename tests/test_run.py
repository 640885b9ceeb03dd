"""run.py and eval.py through the functions that the command line calls."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch

import eval as evaluation
import run
from model.checkpoint import read_checkpoint
from tests.conftest import write_tiny
from tests.dataset.files import SIZE, picture, save
from utils.config.cli import guarded
from utils.config.loading import load_options
from utils.errors import UserError
from utils.plots.tables import METRICS

pytestmark = pytest.mark.usefixtures("no_figures")

FILES = (
    *("best.ckpt", "last.ckpt", "options.json", "provenance.json", "metrics.json", "metrics.csv"),
    *("confusion.npz", "confusion.png", "predictions.png", "class_iou.png", "explanation.png", "report.html"),
)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def state_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The option file, folder and result of a run with CRF and figures; tests read it."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_tiny(folder, train__seed=7, train__epoch=2, eval__pictures=2, eval__last_step=True)
    (result,) = run.main(["--opt", path])
    return path, folder / "output", result


def test_train_then_evaluate__same_numbers_exactly(trained):
    path, output, result = trained
    (evaluated,) = evaluation.main(["--opt", path, "--checkpoint", "tiny", "wandb.name=again"])
    (tested,) = run.main(["--opt", path, "--test"])
    checkpoint = str(output / "tiny/last.ckpt")
    (newest,) = evaluation.main(["--opt", path, "--checkpoint", checkpoint, "wandb.name=newest"])
    state = state_of(result["checkpoint"])
    head, last = (state[f"segmenter.{part}.mlp.fc1.weight"] for part in ("head", "backbone.blocks.1"))
    assert not torch.equal(head, last)  # the network was trained
    for stage in ("before_crf", "after_crf", "class_iou", "valid_loss", "assignment"):
        assert json.dumps(result[stage]) == json.dumps(evaluated[stage]) == json.dumps(tested[stage])
    assert metrics_of(output / "again")["before_crf"] == result["before_crf"]
    assert result["last_step"]["step"] == 8
    assert newest["after_crf"] == metrics_of(output / "tiny")["last_step"]["after_crf"]
    assert "train_hours" in metrics_of(output / "tiny")  # --test writes to a subfolder
    assert metrics_of(output / "tiny/evaluation")["before_crf"] == result["before_crf"]
    assert set(result["after_crf"]) == {*METRICS}


def test_train__writes_all_files_of_a_run(trained):
    _, output, _ = trained
    for name in FILES:
        assert (output / "tiny" / name).stat().st_size > 0
    assert np.load(output / "tiny/confusion.npz")["cluster"].sum() == 6 * 32 * 32
    assert load_options(output / "tiny/options.json").train.seed == 7
    assert json.loads((output / "tiny/provenance.json").read_text())["versions"]["torch"]


def test_published_checkpoint__is_evaluated_to_the_same_numbers(trained, capsys):
    """Exported to <output_dir>/<checkpoint>/ckpt.pth, as the published README says, and from there again."""
    path, output, result = trained
    targets = [output / "released/ckpt.pth", output / "again.pth"]
    evaluation.main(["--export", str(targets[0]), "--checkpoint", str(output / "tiny")])
    evaluation.main(["--export", str(targets[1]), "--opt", path, "--checkpoint", "released"])
    assert f"written in the published format: {targets[0]}" in capsys.readouterr().out
    state = state_of(result["checkpoint"])
    for target in targets:
        exported = read_checkpoint(target).state
        assert exported.keys() == state.keys()
        assert all(torch.equal(value, exported[name]) for name, value in state.items())
    (evaluated,) = evaluation.main(["--opt", path, "--checkpoint", "released", "wandb.name=tiny_eval"])
    for stage in ("before_crf", "after_crf"):
        assert evaluated[stage] == result[stage]


def test_checkpoint__training_can_start_from_one(trained):
    path, output, _ = trained
    words = ["wandb.name=on", "optimizer.net.lr=0", "eval.is_crf=false", "--frozen"]
    run.main(["--opt", path, "--checkpoint", "tiny", *words])
    before, after = state_of(output / "tiny/best.ckpt"), state_of(output / "on-frozen/best.ckpt")
    assert torch.equal(before["segmenter.head.mlp.fc1.weight"], after["segmenter.head.mlp.fc1.weight"])


def test_crf__either_backend_gives_the_same_metrics(trained, monkeypatch, capsys):
    """Without pydensecrf, "auto" refines in torch and says so; "pydensecrf" leaves the metrics out."""
    path, _, result = trained
    for module in ("utils.vision.crf", "eval"):
        monkeypatch.setattr(f"{module}.crf_missing", lambda: "pydensecrf does not import")
    words = ["--opt", path, "--checkpoint", "tiny", "wandb.name=torch_crf"]
    (evaluated,) = evaluation.main(words)
    assert "the CRF runs in torch, because pydensecrf does not import" in capsys.readouterr().out
    assert evaluated["after_crf"] == pytest.approx(result["after_crf"], abs=0.1)
    assert evaluated["after_crf"] != evaluated["before_crf"]
    (evaluated,) = evaluation.main([*words, "eval.crf_backend=pydensecrf"])
    assert evaluated["before_crf"] == result["before_crf"]
    assert evaluated["after_crf"] is None
    assert "after CRF: pydensecrf does not import" in capsys.readouterr().out


def test_frozen__keeps_the_features_and_is_shown_beside_the_run(tiny_file, tmp_path, capsys):
    run.main(["--opt", tiny_file(), "train.compare_frozen=true", "eval.is_crf=false"])
    frozen = state_of(tmp_path / "output/tiny-frozen/best.ckpt")
    for name, value in frozen.items():
        if name.startswith("segmenter.head."):
            block = name.replace("segmenter.head.", "segmenter.backbone.blocks.1.")
            assert torch.equal(value, frozen[block])
    moved = state_of(tmp_path / "output/tiny/best.ckpt")
    assert not torch.equal(moved["segmenter.head.mlp.fc1.weight"], frozen["segmenter.head.mlp.fc1.weight"])
    printed = capsys.readouterr().out
    assert re.search(r"^tiny-frozen, before CRF .*\ntiny, before CRF  ", printed, re.MULTILINE)
    assert "tiny, after CRF: eval.is_crf is false" in printed


def test_same_seed__same_run_and_an_earlier_one_is_moved_aside(tiny_file, tmp_path):
    path = tiny_file(eval__is_crf=False)
    first, second, other = (run.main(["--opt", path, f"train.seed={seed}"])[0] for seed in (0, 0, 1))
    assert first["valid_loss"] == second["valid_loss"] != other["valid_loss"]
    for name in ("tiny", "tiny.1", "tiny.2"):
        assert (tmp_path / "output" / name / "best.ckpt").is_file()
    with pytest.raises(UserError, match=r"train\.precision is fp16"):  # which moves nothing
        run.main(["--opt", path, "train.precision=fp16"])
    assert (tmp_path / "output/tiny/best.ckpt").is_file()


def test_wandb_run_id__is_that_of_one_run(tiny_file, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agent1")
    with pytest.raises(UserError, match="wandb would merge the 2 runs; unset it"):
        run.main(["--opt", tiny_file(wandb__mode="offline"), "train.compare_frozen=true"])


def test_sweep__one_table_over_seeds(tiny_file, tmp_path, capsys, monkeypatch):
    """Variants, seeds, the baseline and the last step are distinguished; each run is its own in wandb."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    variants = tmp_path / "two.json"
    variants.write_text(json.dumps({"whole": {}, "no steps": {"training_coeff": {"prop_iter": 0}}}))
    path = tiny_file(eval__last_step=True, eval__is_crf=False, wandb__mode="offline")
    results = run.main(["--opt", path, "--variants", str(variants), "train.seed=0,1"])
    assert len(results) == 4
    printed = capsys.readouterr().out
    assert "tiny-no_steps-seed=1: ppap, run 4 of 4, about" in printed
    assert re.search(r"^whole, before CRF +2 ", printed, re.MULTILINE)
    assert re.search(r"^no steps, last step, before CRF\n? +2 ", printed, re.MULTILINE)
    rows = json.loads((tmp_path / "output/tiny-sweep/sweep.json").read_text())
    assert [row["setting"] for row in rows[:3]] == ["whole", "whole, last step", "whole"]
    assert (tmp_path / "output/tiny-sweep/sweep.png").stat().st_size > 1000
    for seed in (0, 1):
        assert len(list((tmp_path / f"output/tiny-whole-seed={seed}").rglob("run-*.wandb"))) == 1


def test_non_finite_loss__stops_and_names_the_step(tiny_file):
    with pytest.raises(UserError, match=r"not finite at step 2 .*supcon_loss nan"):
        run.main(["--opt", tiny_file(), "optimizer.net.lr=1e6", "train.grad_norm=inf", "eval.is_crf=false"])


@pytest.fixture
def unlabelled(tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        for number in range(count):
            save(tmp_path / f"photos/imgs/{split}/{number}.jpg", picture(number))
    return tmp_path / "photos"


@pytest.mark.parametrize("validation", ["unlabelled", "missing", "ignored"])
def test_no_metrics__the_last_step_is_kept(tiny_file, unlabelled, tmp_path, capsys, validation):
    if validation == "missing":
        shutil.rmtree(unlabelled / "imgs/val")
    if validation == "ignored":
        for path in unlabelled.glob("imgs/*/*"):
            label = np.full((SIZE[1], SIZE[0]), 255 if path.parent.name == "val" else 1)
            save(unlabelled / "labels" / path.parent.name / f"{path.stem}.png", label)
    path = tiny_file(dataset__data_type="directory", dataset__n_classes=3)
    words = ["--opt", path, "--data_path", str(unlabelled)]
    (result,) = run.main([*words, "train.epoch=2"])
    assert result["before_crf"] is None
    printed = capsys.readouterr().out
    assert "no labels, so no metrics" in printed
    assert ("\nstep 4        loss of the clusters -0." in printed) == (validation != "missing")
    assert result["images"] == (0 if validation == "missing" else 2)
    assert result["step"] == 4  # 2 epochs of 2
    about = torch.load(tmp_path / "output/tiny/best.ckpt", weights_only=True)["ppap"]
    assert about["train_labelled"] is (validation == "ignored")
    with pytest.raises(UserError, match="3 classes"):
        evaluation.main([*words, "--checkpoint", "tiny", "dataset.n_classes=4"])


def test_command_line__a_damaged_image_in_a_worker_is_one_line(tiny_file, unlabelled, capfd):
    (unlabelled / "imgs/train/3.jpg").write_bytes(b"no image")
    path = tiny_file(dataset__data_type="directory", dataset__n_classes=3, dataloader__num_workers=1)
    assert guarded(partial(run.main, ["--opt", path, "--data_path", str(unlabelled)])) == 2
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    assert "3.jpg: not a readable image" in printed.splitlines()[-1]


def test_measure_sets__needs_labels_and_no_checkpoint(tiny_file, tmp_path, unlabelled):
    path = tiny_file(dataloader__batch_size=4)
    (rows,) = evaluation.main(["--opt", path, "--measure-sets", "training_coeff.prop_iter=3"])
    assert len(rows) == 4
    for row in rows:
        assert row["positives"] + row["ambiguous"] + row["negatives"] == pytest.approx(100)
    folder = tmp_path / "output/tiny"
    assert json.loads((folder / "sets.json").read_text()) == rows
    assert (folder / "sets.png").stat().st_size > 1000
    words = ["dataset.data_type=directory", "dataset.n_classes=3", "--data_path", str(unlabelled)]
    with pytest.raises(UserError, match="needs labels"):
        evaluation.main(["--opt", path, *words, "--measure-sets"])
