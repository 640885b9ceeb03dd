"""STEGO and HP through the programs, as PPAP: training, evaluation, masks, caches and devices."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
import run
from model import load_segmenter
from model.checkpoint import read_checkpoint
from tests.conftest import METHODS, scalars_of, write_tiny
from tests.test_distributed import STARTERS
from utils.config.loading import REPOSITORY, nest
from utils.errors import UserError
from utils.plots.tables import METRICS

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.mark.parametrize("method", METHODS)
def test_method__trains_evaluates_and_writes_masks(method, tiny_file, tmp_path, monkeypatch):
    (trained,) = run.main(["--opt", tiny_file(**METHODS[method], eval__crf_backend="torch")])
    folder = tmp_path / "output/tiny"
    assert set(trained["before_crf"]) == set(trained["after_crf"]) == {*METRICS}
    assert trained["trainable_parameters"] == {"stego": 1100, "hp": 1210}[method]
    assert all(np.isfinite(scalars_of(folder, f"{method}_loss")))
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        (again,) = evaluation.main(["--checkpoint", ".", "eval.is_crf=false"])
    assert again["before_crf"] == trained["before_crf"]
    assert (folder / "evaluation/metrics.json").exists()
    segment = load_segmenter(folder)
    assert segment(np.zeros((40, 56, 3), np.uint8)).shape == (40, 56)
    with pytest.raises(UserError, match=f"method {method}; the published format is PPAP's"):
        evaluation.main(["--checkpoint", str(folder), "--export", str(tmp_path / "ckpt.pth")])
    with pytest.raises(UserError, match=f"method is {method}, must be ppap with --explain"):
        evaluation.main(["--checkpoint", str(folder), "--explain", "0"])


def test_hp__needs_other_weights_than_ppap(tiny_file, tmp_path):
    """A checkpoint of another method is not loaded, whichever way round."""
    run.main(["--opt", tiny_file(), "eval.is_crf=false"])
    words = ["--opt", tiny_file(**METHODS["hp"]), "--checkpoint", str(tmp_path / "output/tiny")]
    with pytest.raises(UserError, match="does not fit the options"):
        evaluation.main(words)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cache", [pytest.param("ram", marks=pytest.mark.slow), "disk"])
def test_method__cached_tokens_give_nearly_the_same_run(method, cache, tiny_file, tmp_path):
    """Tokens are stored as float16."""
    words, runs = ["--opt", tiny_file(**METHODS[method], hp__alpha=0.0, eval__is_crf=False)], {}
    for kind in ("null", cache):
        run.main([*words, f"wandb.name={kind}-cache", f"dataset.cache_features={kind}"])
        runs[kind] = scalars_of(tmp_path / f"output/{kind}-cache", f"{method}_loss")
    assert runs[cache] == pytest.approx(runs["null"], rel=0.02)


def test_max_steps__ends_the_run_with_a_validation(tiny_file, tmp_path, capsys):
    """After 6 steps of epochs of 4."""
    path = tiny_file(train__epoch=5, train__max_steps=6, train__valid_freq=100, eval__is_crf=False)
    run.main(["--opt", path])
    shown, folder = capsys.readouterr(), tmp_path / "output/tiny"
    assert "steps     6: 2 epochs of 4" in shown.out
    assert "epoch 2/2" in shown.err
    assert scalars_of(folder, "iters", where="valid_loss") == [4, 6]
    assert torch.load(folder / "last.ckpt", weights_only=True)["progress"]["step"] == 6


def test_flip__averages_the_code_of_the_mirror_image(tiny_file, tmp_path):
    """In the evaluation alone."""
    words = ["--opt", tiny_file(**METHODS["stego"], eval__is_crf=False)]
    (plain,) = run.main(words)
    (flipped,) = run.main([*words, "eval.flip=true", "wandb.name=flipped"])
    rows = [scalars_of(tmp_path / "output" / name, "valid_loss") for name in ("tiny", "flipped")]
    assert rows[0] == rows[1]
    assert flipped["valid_loss"] != plain["valid_loss"]


def test_variants__compare_methods_in_one_table(tiny_file, tmp_path, capsys):
    variants = tmp_path / "methods.json"
    frozen = {"frozen": {"method": "frozen"}, "PPAP": {}}
    variants.write_text(json.dumps(frozen | {name: nest(changed) for name, changed in METHODS.items()}))
    words = ["--opt", tiny_file(eval__is_crf=False), "--variants", str(variants)]
    assert len(run.main(words)) == 4
    costs = capsys.readouterr().out.rsplit("parameters\n", 1)[1].splitlines()[1:5]
    assert [line.split()[-1] for line in costs] == ["0", "7,824", "1,100", "1,210"]
    assert "s / step | parameters" in (tmp_path / "output/tiny-sweep/sweep.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_method__two_processes_are_one(method, tmp_path):
    path = write_tiny(tmp_path, **METHODS[method], eval__is_crf=False)
    plain = {name: value for name, value in os.environ.items() if name not in STARTERS}
    for devices in (1, 2):
        words = ["run.py", "--opt", path, f"trainer.devices={devices}", f"wandb.name={devices}"]
        subprocess.run([sys.executable, *words], cwd=REPOSITORY, env=plain, timeout=300, check=True)
    one, two = (read_checkpoint(tmp_path / f"output/{name}/last.ckpt") for name in (1, 2))
    for name, value in one.state.items():
        # Adam divides by the gradient
        torch.testing.assert_close(two.state[name], value, atol=1e-4, rtol=1e-4, msg=name)
    assert scalars_of(tmp_path / "output/1", "total_loss") == pytest.approx(
        scalars_of(tmp_path / "output/2", "total_loss"), rel=1e-5
    )
