"""run.py and eval.py through the functions that the command line calls."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import run
from utils.config.loading import REPOSITORY, load_options
from utils.errors import UserError


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_train_then_evaluate__same_numbers_exactly(tiny_file, tmp_path):
    path = tiny_file()
    (trained,) = run.main(["--opt", path])
    (evaluated,) = evaluation.main(["--opt", path, "--checkpoint", "tiny", "wandb.name=again"])
    (tested,) = run.main(["--opt", path, "--test"])
    state = torch.load(trained["checkpoint"], weights_only=True)["state_dict"]
    head, last = (state[f"segmenter.{part}.mlp.fc1.weight"] for part in ("head", "backbone.blocks.1"))
    assert not torch.equal(head, last)  # a trained network is compared, not one as it was built
    for stage in ("before_crf", "after_crf", "class_iou", "valid_loss", "assignment"):
        assert json.dumps(trained[stage]) == json.dumps(evaluated[stage]) == json.dumps(tested[stage])
    stored = metrics_of(tmp_path / "output" / "again")
    assert stored["before_crf"] == trained["before_crf"]
    assert set(trained["after_crf"]) == {"Cluster_Accuracy", "Cluster_mIoU", "Linear_Accuracy", "Linear_mIoU"}
    for name in (
        "best.ckpt",
        "options.json",
        "provenance.json",
        "metrics.csv",
        "confusion.npz",
        "confusion.png",
        "predictions.png",
        "class_iou.png",
        "explanation.png",
        "report.html",
    ):
        assert (tmp_path / "output" / "tiny" / name).stat().st_size > 0
    confusion = np.load(tmp_path / "output" / "tiny" / "confusion.npz")
    assert confusion["cluster"].sum() == 6 * 32 * 32


def test_published_checkpoint__is_evaluated_to_the_same_numbers(tiny_file, tmp_path):
    """<output_dir>/<checkpoint>/ckpt.pth, as the published README has it."""
    path = tiny_file()
    (trained,) = run.main(["--opt", path])
    state = torch.load(trained["checkpoint"], weights_only=True)["state_dict"]

    def part(theirs, ours):
        return {theirs + k.removeprefix(ours): v for k, v in state.items() if k.startswith(ours)}

    net = part("model.", "segmenter.backbone.") | part("decoder.", "segmenter.head.")
    published = {
        "net_model_state_dict": net | part("project_head.", "segmenter.projection."),
        "linear_model_state_dict": part("", "linear_probe.classifier."),
        "cluster_model_state_dict": part("", "cluster_probe."),
    }
    (tmp_path / "output/released").mkdir()
    torch.save(published, tmp_path / "output/released/ckpt.pth")
    (evaluated,) = evaluation.main(["--opt", path, "--checkpoint", "released", "wandb.name=tiny_eval"])
    for stage in ("before_crf", "after_crf"):
        assert evaluated[stage] == trained[stage]


def test_options__saved_beside_the_run_are_an_option_file(tiny_file, tmp_path):
    run.main(["--opt", tiny_file(), "train.seed=7", "eval.is_crf=false"])
    saved = load_options(tmp_path / "output/tiny/options.json")
    assert saved.train.seed == 7
    assert json.loads((tmp_path / "output/tiny/provenance.json").read_text())["versions"]["torch"]


def test_frozen__keeps_the_features_and_has_its_own_folder(tiny_file, tmp_path):
    path = tiny_file()
    run.main(["--opt", path, "--frozen"])
    state = torch.load(tmp_path / "output/tiny-frozen/best.ckpt", weights_only=True)["state_dict"]
    for name, value in state.items():
        if name.startswith("segmenter.head."):
            block = name.replace("segmenter.head.", "segmenter.backbone.blocks.1.")
            assert torch.equal(value, state[block])
    run.main(["--opt", path])
    moved = torch.load(tmp_path / "output/tiny/best.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(moved["segmenter.head.mlp.fc1.weight"], state["segmenter.head.mlp.fc1.weight"])
    assert torch.equal(
        moved["segmenter.backbone.blocks.1.mlp.fc1.weight"],
        state["segmenter.backbone.blocks.1.mlp.fc1.weight"],
    )


def test_compare_frozen__shows_both_side_by_side(tiny_file, capsys):
    run.main(["--opt", tiny_file(), "train.compare_frozen=true", "eval.is_crf=false"])
    printed = capsys.readouterr().out
    assert "| tiny-frozen, before CRF |" in printed
    assert "| tiny, before CRF        |" in printed
    assert "tiny, after CRF: eval.is_crf is false" in printed


def test_same_seed__same_run(tiny_file):
    path = tiny_file()
    first, second, other = (
        run.main(["--opt", path, f"train.seed={seed}", "eval.is_crf=false"])[0] for seed in (0, 0, 1)
    )
    assert first["valid_loss"] == second["valid_loss"] != other["valid_loss"]


def test_earlier_run__is_moved_aside(tiny_file, tmp_path):
    path = tiny_file()
    for _ in range(2):
        run.main(["--opt", path, "eval.is_crf=false"])
    assert (tmp_path / "output/tiny/best.ckpt").is_file()
    assert (tmp_path / "output/tiny.1/best.ckpt").is_file()


def test_sweep__one_table_over_seeds(tiny_file, capsys):
    words = ["training_coeff.prop_iter=0,1", "train.seed=0,1", "eval.is_crf=false"]
    results = run.main(["--opt", tiny_file(), *words])
    assert len(results) == 4
    assert "| training_coeff.prop_iter=1, before CRF |    2 |" in capsys.readouterr().out


def test_checkpoint__training_can_start_from_one(tiny_file, tmp_path):
    path = tiny_file()
    run.main(["--opt", path])
    run.main(
        ["--opt", path, "--checkpoint", "tiny", "wandb.name=on", "optimizer.net.lr=0", "eval.is_crf=false"]
    )
    before = torch.load(tmp_path / "output/tiny/best.ckpt", weights_only=True)["state_dict"]
    after = torch.load(tmp_path / "output/on/best.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(before["segmenter.head.mlp.fc1.weight"], after["segmenter.head.mlp.fc1.weight"])


def test_test_flag__keeps_the_results_of_the_run(tiny_file, tmp_path):
    path = tiny_file()
    run.main(["--opt", path, "--frozen", "eval.is_crf=false"])
    run.main(["--opt", path, "--frozen", "--test", "eval.is_crf=false"])
    folder = tmp_path / "output/tiny-frozen"
    assert "train_hours" in metrics_of(folder)
    assert metrics_of(folder / "evaluation")["before_crf"] == metrics_of(folder)["before_crf"]


def test_precision__that_does_not_fit_leaves_an_earlier_run_alone(tiny_file, tmp_path):
    path = tiny_file()
    run.main(["--opt", path, "eval.is_crf=false"])
    with pytest.raises(UserError, match=r"train\.precision is fp16"):
        run.main(["--opt", path, "train.precision=fp16"])
    assert (tmp_path / "output/tiny/best.ckpt").is_file()


def test_wandb__every_run_of_a_sweep_is_a_run_of_its_own(tiny_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run.main(["--opt", tiny_file(wandb__mode="offline"), "train.seed=0,1", "eval.is_crf=false"])
    for seed in (0, 1):
        assert len(list((tmp_path / f"output/tiny-seed={seed}").rglob("run-*.wandb"))) == 1


def test_crf__without_pydensecrf_all_else_runs(tiny_file, monkeypatch, capsys):
    monkeypatch.setattr("utils.vision.crf.crf_missing", lambda: "pydensecrf does not import")
    (result,) = run.main(["--opt", tiny_file(eval__crf_backend="pydensecrf")])
    assert result["before_crf"]
    assert result["after_crf"] is None
    assert "tiny, after CRF: pydensecrf does not import" in capsys.readouterr().out


def test_crf__either_backend_gives_the_same_metrics(tiny_file, monkeypatch):
    path = tiny_file()
    (trained,) = run.main(["--opt", path])
    words = ["--opt", path, "--checkpoint", "tiny", "wandb.name=again", "eval.crf_backend=torch"]
    monkeypatch.setattr("utils.vision.crf.crf_missing", lambda: "pydensecrf does not import")
    (evaluated,) = evaluation.main(words)
    assert evaluated["after_crf_missing"] is None
    assert evaluated["after_crf"] == pytest.approx(trained["after_crf"], abs=0.1)
    assert evaluated["after_crf"] != evaluated["before_crf"]


def test_non_finite_loss__stops_and_says_where(tiny_file):
    with pytest.raises(UserError, match=r"not finite at step 2 .*PPAP nan"):
        run.main(["--opt", tiny_file(), "optimizer.net.lr=1e6", "train.grad_norm=inf", "eval.is_crf=false"])


@pytest.fixture
def unlabelled(tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        (tmp_path / "photos/imgs" / split).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"photos/imgs/{split}/{number}.jpg")
    return tmp_path / "photos"


def test_validation_labels__that_are_all_ignored_leave_the_newest(tiny_file, unlabelled):
    for split in ("train", "val"):
        (unlabelled / "labels" / split).mkdir(parents=True)
        blank = Image.fromarray(np.full((40, 50), 255 if split == "val" else 1, dtype=np.uint8))
        for path in (unlabelled / "imgs" / split).iterdir():
            blank.save(unlabelled / "labels" / split / f"{path.stem}.png")
    path = tiny_file(dataset__data_type="directory", dataset__n_classes=3, eval__is_crf=False)
    (result,) = run.main(["--opt", path, "--data_path", str(unlabelled), "train.epoch=2"])
    assert result["before_crf"] is None
    assert result["step"] == 4


@pytest.mark.parametrize("with_val", [True, False])
def test_unlabelled__trains_clusters_alone_and_keeps_the_last(
    tiny_file, unlabelled, tmp_path, capsys, with_val
):
    import shutil

    if not with_val:
        shutil.rmtree(unlabelled / "imgs/val")
    path = tiny_file(dataset__data_type="directory", dataset__n_classes=3)
    (result,) = run.main(["--opt", path, "--data_path", str(unlabelled), "train.epoch=2"])
    assert result["before_crf"] is None
    assert result["images"] == (2 if with_val else 0)
    assert result["step"] == 4  # 2 epochs of 2
    assert "no linear probe" in capsys.readouterr().out
    about = torch.load(tmp_path / "output/tiny/best.ckpt", weights_only=True)["ppap"]
    assert about["train_labelled"] is False


def command(program, *arguments, cwd=REPOSITORY):
    return subprocess.run(
        [sys.executable, str(REPOSITORY / program), *arguments], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize("program", ["run.py", "eval.py"])
def test_command_line__mistakes_give_status_two_without_a_traceback(program, tmp_path):
    for arguments in (
        ["--opt", "demmo.json"],
        ["--opt", "demo.json", "train.epoc=1", "train.seed=x"],
        ["--opt", "demo.json", "+train.epoch=1"],
        ["--opt", "camvid.json", "--data_path", "nowhere"],
    ):
        done = command(program, *arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_command_line__missing_checkpoint(tiny_file):
    done = command("eval.py", "--opt", tiny_file(), "--checkpoint", "nowhere")
    assert done.returncode == 2
    assert "checkpoint nowhere: none of" in done.stderr
    assert "no checkpoint is named" in command("eval.py", "--opt", tiny_file()).stderr


def test_command_line__a_damaged_image_in_a_worker_is_told_in_one_line(tiny_file, unlabelled):
    (unlabelled / "imgs/train/3.jpg").write_bytes(b"no image")
    path = tiny_file(dataset__data_type="directory", dataset__n_classes=3, dataloader__num_workers=1)
    done = command("run.py", "--opt", path, "--data_path", str(unlabelled))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "3.jpg: not a readable image" in done.stderr.splitlines()[-1]


def test_evaluate__without_validation_images_or_labels_has_no_metrics(tiny_file, unlabelled):
    path = tiny_file(dataset__data_type="directory", dataset__n_classes=3)
    run.main(["--opt", path, "--data_path", str(unlabelled)])
    with pytest.raises(UserError, match="3 classes"):
        evaluation.main(
            ["--opt", path, "--data_path", str(unlabelled), "--checkpoint", "tiny", "dataset.n_classes=4"]
        )


def test_last_step__is_evaluated_beside_the_best(tiny_file, tmp_path, capsys):
    path = tiny_file(train__epoch=2, eval__last_step=True, eval__is_crf=False)
    (result,) = run.main(["--opt", path])
    assert result["last_step"]["step"] == 8
    (last,) = evaluation.main(["--opt", path, "--checkpoint", str(tmp_path / "output/tiny/last.ckpt")])
    assert last["before_crf"] == result["last_step"]["before_crf"]
    assert metrics_of(tmp_path / "output/tiny")["last_step"]["before_crf"] == last["before_crf"]
    assert "| tiny, last step, before CRF |" in capsys.readouterr().out


def test_sweep__rows_of_baseline_and_last_step_are_told_apart(tiny_file, tmp_path):
    path = tiny_file(train__compare_frozen=True, eval__last_step=True, eval__is_crf=False)
    run.main(["--opt", path, "train.seed=0,1"])
    rows = json.loads((tmp_path / "output/tiny-sweep/sweep.json").read_text())
    settings = [row["setting"] for row in rows]
    assert settings == ["frozen", "frozen, last step", "PPAP", "PPAP, last step"] * 2
    assert (tmp_path / "output/tiny-sweep/sweep.png").stat().st_size > 1000


def test_variants__one_row_each_over_seeds(tiny_file, tmp_path, capsys):
    variants = tmp_path / "two.json"
    variants.write_text(json.dumps({"whole": {}, "no steps": {"training_coeff": {"prop_iter": 0}}}))
    words = ["--variants", str(variants), "train.seed=0,1", "eval.is_crf=false"]
    results = run.main(["--opt", tiny_file(), *words])
    assert len(results) == 4
    printed = capsys.readouterr().out
    assert "| whole, before CRF    |    2 |" in printed
    assert "| no steps, before CRF |    2 |" in printed


def test_measure_sets__needs_labels_and_no_checkpoint(tiny_file, tmp_path, unlabelled):
    path = tiny_file(dataloader__batch_size=4)
    (rows,) = evaluation.main(["--opt", path, "--measure-sets", "training_coeff.prop_iter=3"])
    assert len(rows) == 4
    for row in rows:
        assert row["positives"] + row["ambiguous"] + row["negatives"] == pytest.approx(100)
        assert 0 <= row["precision"] <= 100
    folder = tmp_path / "output/tiny"
    assert json.loads((folder / "sets.json").read_text()) == rows
    assert (folder / "sets.png").stat().st_size > 1000
    path = tiny_file(dataset__data_type="directory", dataset__n_classes=3)
    with pytest.raises(UserError, match="--measure-sets needs labels of the validation split"):
        evaluation.main(["--opt", path, "--data_path", str(unlabelled), "--measure-sets"])
