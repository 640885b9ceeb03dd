"""Two processes on half a batch each are one process on the whole batch: losses, gradients and metrics."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import run
from dataset.samplers import EvaluationBatchSampler
from tests import in_two
from tests.conftest import write_tiny
from tests.dataset.files import save
from utils.config.cli import guarded
from utils.config.loading import REPOSITORY
from utils.config.options import TrainerOptions
from utils.errors import NotFinite, UserError
from utils.training import launch

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TIMES = ("images_per_s", "train_hours", "peak_memory_gib", "checkpoint")
MINUTE = 60
STARTERS = (*launch.NUMBERS, "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS")
STARTERS += ("SLURM_CPUS_PER_TASK",)
CASES = [*(f"loss, {case}" for case in in_two.LOSSES), *(f"probes, {case}" for case in in_two.IGNORED)]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A folder, and two processes that start while the tests' own is at work.

    Lightning starts the second one, as it does for run.py.
    """
    folder = tmp_path_factory.mktemp("two")
    words = ["--opt", few_steps(folder), "wandb.name=two", "trainer.devices=2", "trainer.strategy=ddp"]
    pair = subprocess.Popen(
        [sys.executable, "-m", "tests.in_two", str(folder), *words],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=without_launcher(),
    )  # fmt: skip
    yield folder, pair
    pair.kill()


@pytest.fixture(scope="module")
def finished(started):
    """The folder, what one process has come to, and what two have printed."""
    folder, pair = started
    with in_two.without_explanation():
        (one,) = run.main(["--opt", str(folder / "tiny.json")])
    printed, _ = pair.communicate(timeout=3 * MINUTE)
    assert pair.returncode == 0, printed
    return folder, one, printed


def without_launcher():
    """The environment without a launcher's variables."""
    return {name: value for name, value in os.environ.items() if name not in STARTERS}


def few_steps(folder):
    """8 steps of 4 photographs, two validations an epoch of 7 images in 3 batches."""
    data = {"dataset__data_type": "directory", "dataset__data_path": str(folder / "data")}
    train = {"train__epoch": 2, "train__print_freq": 1, "dataloader__val_batch_size": 3}
    evaluation = {"eval__crf_backend": "torch", "eval__pictures": 3, "eval__batch_size": 2}
    make_photographs(folder / "data")
    return write_tiny(folder, wandb__name="one", **data, **train, **evaluation)


def make_photographs(root):
    """17 to train on and 7 to validate on; a label ignores a part of its image, and some all of it."""
    drawn = np.random.default_rng(0)
    for split, count in (("train", 17), ("val", 7)):
        for number in range(count):
            classes = np.kron(drawn.integers(0, 3, (4, 4)), np.ones((10, 10), int))
            image = 60 * classes[..., None] + drawn.integers(0, 90, (40, 40, 3))
            classes[: 4 * drawn.integers(11)] = 255
            save(root / "imgs" / split / f"{number:02d}.png", image)
            save(root / "labels" / split / f"{number:02d}.png", classes)
    about = {"n_classes": 3, "classes": ["dark", "grey", "light"], "ignore": 255}
    (root / "classes.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def found(finished):
    """What one process finds for the whole batch, and each of the two for its half."""
    folder, _, _ = finished
    return in_two.everything(), [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", [*CASES, "dropout", "hidden positives"])
def test_losses__of_the_global_batch(found, case):
    """Values are those of the whole batch on both, gradients its slices or parts of its sum."""
    whole, parts = found
    for name, expected in whole[case].items():
        shares = [part[case][name] for part in parts]
        if name == "sliced":
            shares = [torch.cat(shares)]
        elif name == "added":
            shares = [sum(shares)]
        for share in shares:
            torch.testing.assert_close(share, expected, **CLOSE)


def test_run__of_two_processes_is_that_of_one(finished):
    """The command of the README, with unequal shares of labels and 7 validation images."""
    folder, one, printed = finished
    assert printed.count("two: best at step") == 1  # the first process alone prints
    output = folder / "output"
    two = json.loads((output / "two/metrics.json").read_text())
    assert two["images"] == one["images"] == 7
    assert two["before_crf"] == pytest.approx(one["before_crf"], abs=1e-5)
    assert two["after_crf"] == pytest.approx(one["after_crf"], abs=1e-5)
    assert two["valid_loss"] == pytest.approx(one["valid_loss"], abs=1e-5)
    assert two["assignment"] == one["assignment"]
    for file in ("confusion.npz", "predictions.png"):
        assert (output / "two" / file).read_bytes() == (output / "one" / file).read_bytes()
    rows = [list(csv.DictReader((output / name / "metrics.csv").open())) for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 8 + 4
    for row, other in zip(*rows, strict=True):
        assert {k for k in row if row[k]} - set(TIMES) == {k for k in other if other[k]} - set(TIMES)
        for name in row.keys() - set(TIMES):
            if row[name]:
                assert float(other[name]) == pytest.approx(float(row[name]), rel=1e-5, abs=1e-5), name
    states = [
        torch.load(output / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("one", "two")
    ]
    for name, value in states[0].items():
        # Adam divides by the gradient
        torch.testing.assert_close(states[1][name], value, atol=1e-4, rtol=1e-4)
    assert not list(Path(output).glob("*.[0-9]"))  # no process has moved another's folder aside


def as_process(monkeypatch, rank, count):
    for module in ("utils.training.distributed", "dataset.samplers"):
        monkeypatch.setattr(f"{module}.rank", lambda: rank)
        monkeypatch.setattr(f"{module}.world_size", lambda: count)


@pytest.mark.parametrize("images", [1, 7, 8, 17])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shared_batches__each_image_once_and_equally_many_turns(monkeypatch, images, count):
    counted, turns = [], set()
    for rank in range(count):
        as_process(monkeypatch, rank, count)
        batches = EvaluationBatchSampler(images, 3)
        turns.add(len(batches))
        for turn, batch in enumerate(batches):
            assert batch  # a loader cannot make a batch of nothing
            if batches.number(turn) < batches.total:
                assert batch[0] == batches.number(turn) * 3
                counted += batch
    assert sorted(counted) == list(range(images))
    assert len(turns) == 1


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, True),
    ],
)
def test_is_first__as_torchrun_slurm_and_lightning_tell(monkeypatch, environment, first):
    launched(monkeypatch, environment)
    assert launch.is_rank_zero() is first
    assert launch.started_by_lightning() is (environment == {"LOCAL_RANK": "1", "NODE_RANK": "0"})


@pytest.mark.parametrize(
    ("environment", "found", "share"),
    [
        ({}, 96, 12),
        ({}, 4, 1),
        ({"SLURM_CPUS_PER_TASK": "12", "SLURM_STEP_NUM_TASKS": "8"}, 96, 12),
        ({"SLURM_CPUS_PER_TASK": "96", "SLURM_STEP_NUM_TASKS": "1"}, 96, 12),  # Lightning's first launch
        ({"SLURM_CPUS_PER_TASK": "96", "SLURM_STEP_NUM_TASKS": "2", "RANK": "3", "LOCAL_RANK": "3"}, 96, 12),
    ],
)
def test_own_cores__of_eight_processes(monkeypatch, environment, found, share):
    """srun may have divided the cores, or not have bound its tasks."""
    launched(monkeypatch, environment)
    monkeypatch.setattr(launch, "cores", lambda: found)
    assert launch.own_cores(8) == share


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_PROCID"])
def test_launcher_variable__that_is_no_number(monkeypatch, capsys, name):
    launched(monkeypatch, {name: "one"})
    assert guarded(lambda: None) == 2
    assert f"{name} is 'one', must be a number" in capsys.readouterr().err


def launched(monkeypatch, environment):
    for name in STARTERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "16"}
SRUN = {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "devices", "nodes", "started"),
    [
        ({}, 2, 1, None),
        (TORCHRUN, 8, 2, None),
        (TORCHRUN, 1, 1, 16),
        (SRUN, 2, 2, None),
        ({"SLURM_JOB_ID": "1"}, 2, 1, 1),
    ],
)
def test_launch__must_fit_the_options(monkeypatch, environment, devices, nodes, started):
    launched(monkeypatch, environment)
    wanted = TrainerOptions(devices=devices, num_nodes=nodes)
    if started is None:
        launch.check_launch(wanted)
    else:
        with pytest.raises(UserError, match=f"is {devices} x {nodes}, but {started} processes were started;"):
            launch.check_launch(wanted)


def test_guarded__one_process_tells_what_all_have_met(monkeypatch, capsys):
    def fails(error):
        def main():
            print("progress")
            raise error

        return guarded(main)

    launched(monkeypatch, {"RANK": "1"})
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which guarded silences
    assert fails(NotFinite("the loss")) == 0
    assert fails(UserError("an image")) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "error: an image\n")
    launched(monkeypatch, {"RANK": "0"})
    assert fails(NotFinite("the loss")) == 2


LEAVING = """
import os, signal, sys
import run
from model import PPAPModule
from utils.config.cli import guarded
from utils.errors import exit_on_signals

step = PPAPModule.training_step

def signalled(module, batch, batch_idx):
    if module.global_step == 3 and os.environ["LOCAL_RANK"] == "0":  # in step 4, the last of an epoch
        os.kill(os.getpid(), signal.SIGTERM)
    return step(module, batch, batch_idx)

PPAPModule.training_step = signalled
exit_on_signals()
sys.exit(guarded(run.main))
"""


STOPPED = LEAVING.replace("training_step", "validation_step")
STOPPED = STOPPED.replace("module.global_step == 3", 'module.trainer.state.fn == "validate"')


def run_two(folder, program, *words):
    """Runs a program in two processes; returns the first one's status and output."""
    words = ["--opt", few_steps(folder), "trainer.devices=2", "eval.is_crf=false", *words]
    return subprocess.run(
        [sys.executable, program, *words],
        cwd=REPOSITORY, env={**without_launcher(), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=5 * MINUTE, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_run__of_two_processes_is_stopped_in_its_evaluation(tmp_path):
    """Lightning's handler would wait for the second process."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    done = run_two(tmp_path, tmp_path / "stopped.py")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "interrupted" in done.stderr


@pytest.mark.slow
def test_run__of_two_processes_resumes(tmp_path):
    """The first process is asked to leave; the validation of that step is still to be done."""
    (tmp_path / "leaving.py").write_text(LEAVING)
    for program, status, words in (
        ("run.py", 0, ["wandb.name=whole"]),
        (tmp_path / "leaving.py", 128 + signal.SIGTERM, ["wandb.name=left"]),
        ("run.py", 0, ["wandb.name=left", "--resume"]),
    ):
        done = run_two(tmp_path, program, *words)
        assert done.returncode == status, done.stderr
    assert "resuming after step 4" in done.stdout
    whole, left = (tmp_path / "output" / name for name in ("whole", "left"))
    rows = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in (whole, left)]
    for row, other in zip(*rows, strict=True):
        assert {**row, "images_per_s": ""} == {**other, "images_per_s": ""}
    states = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (whole, left)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
