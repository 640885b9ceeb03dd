import math

import pytest
import torch

from utils.errors import UserError
from utils.training.run_dir import Progress, RunDir


def save(path, step, **progress):
    torch.save({"progress": {"step": step, **progress}, "weights": torch.zeros(1000)}, path)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_finished__once_the_result_of_training_is_there(tiny_options):
    run_dir = RunDir(options := tiny_options())
    run_dir.prepare(options, [], {})
    run_dir.write_metrics({"step": 4})  # of an evaluation
    assert run_dir.final_metrics() is None
    run_dir.write_metrics({"step": 4, "train_hours": 1.0})
    assert run_dir.final_metrics()["step"] == 4


def test_check_options__lists_each_difference_that_affects_the_result(tiny_options):
    run_dir = RunDir(options := tiny_options())
    run_dir.check_options(options)  # nothing there
    run_dir.prepare(options, [], {})
    run_dir.check_options(tiny_options(dataloader__num_workers=1, wandb__notes="x", trainer__devices=2))
    with pytest.raises(UserError) as error:
        run_dir.check_options(tiny_options(training_coeff__tau=0.5, train__seed=1, resume="auto"))
    assert "training_coeff.tau was 0.8, is 0.5" in str(error.value)
    assert "train.seed was 0, is 1" in str(error.value)
    assert "resume was" not in str(error.value)


def test_check_options__sees_that_a_run_is_extended(tiny_options):
    """Each rank does, before the first one renames metrics.json; other mistakes leave it as it is."""
    run_dir = RunDir(options := tiny_options())
    run_dir.prepare(options, [], {})
    run_dir.write_metrics({"train_hours": 1.0})
    assert not run_dir.check_options(options)
    longer = tiny_options(train__epoch=7)
    found = run_dir.check_options(longer)
    assert run_dir.final_metrics() is not None
    run_dir.extend(longer, found)
    assert run_dir.final_metrics() is None
    assert (run_dir.path / "metrics-1-epochs.json").exists()
    assert not run_dir.check_options(longer)


def test_resume_point__takes_the_last_that_is_readable(tiny_options, capsys):
    run_dir = RunDir(options := tiny_options(resume="auto"))
    assert run_dir.resume_point(options) == (None, Progress())
    assert "no checkpoint to resume from" in capsys.readouterr().out
    run_dir.prepare(options, [], {})
    save(run_dir.best, 7)
    save(run_dir.last, 9)
    assert run_dir.resume_point(tiny_options()) == (None, Progress())
    assert run_dir.resume_point(options) == (run_dir.last, Progress(step=9))
    damage(run_dir.last)
    assert run_dir.resume_point(options) == (run_dir.best, Progress(step=7))
    printed = capsys.readouterr().out
    assert f"{run_dir.last}: not a readable checkpoint" in printed
    assert "resuming after step 7" in printed
    damage(run_dir.best)
    assert run_dir.resume_point(options) == (None, Progress())


@pytest.mark.parametrize(("scored_step", "best"), [(9, 150.0), (7, -math.inf)])
@pytest.mark.parametrize("missing", [True, False])
def test_resume_point__replaces_a_best_that_is_lost(tiny_options, capsys, scored_step, best, missing):
    """The score of the last checkpoint counts if it is of its own step."""
    run_dir = RunDir(options := tiny_options(resume="auto"))
    run_dir.prepare(options, [], {})
    save(run_dir.last, 9, best=170.0, score=150.0, scored_step=scored_step)
    if not missing:
        save(run_dir.best, 7)
        damage(run_dir.best)
    path, progress = run_dir.resume_point(options)
    assert (path, progress.step, progress.best) == (run_dir.last, 9, best)
    for path in (run_dir.best, run_dir.last):
        assert torch.load(path, weights_only=True)["progress"]["best"] == best
    assert f"{run_dir.best} is damaged or missing; step 9 takes its place" in capsys.readouterr().out


def test_lock__in_a_folder_that_cannot_be_written(tiny_options):
    with (
        pytest.raises(UserError, match=r"/proc/ppap: cannot be written .*choose another output_dir"),
        RunDir(tiny_options(output_dir="/proc/ppap")).lock(),
    ):
        pass
