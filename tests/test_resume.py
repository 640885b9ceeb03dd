"""A run that is interrupted and resumed equals the uninterrupted run, bit for bit."""

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import run
from loss import PPAPLossOutput
from model import criterion, register_loss
from model.module import PPAPModule
from tests.conftest import write_tiny
from utils.config.cli import guarded
from utils.config.options import LOSSES
from utils.errors import UserError
from utils.training.checkpointing import BEST, LAST, CheckpointManager, read_progress, validation_due
from utils.training.run_dir import locked
from utils.training.stopping import Stopped, StopSignal

TIMES = {"images_per_s", "train_hours", "peak_memory_gib", "checkpoint"}
LONG = {"train__epoch": 3, "train__valid_freq": 3, "train__print_freq": 1, "eval__is_crf": False}  # 12 steps
SEVEN = LONG | {"train__epoch": 2, "dataset__train_images": 30}  # 14 steps, 7 per epoch


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def same(value, other):
    """Equal to the last bit, tensors too; times do not count."""
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same(value[k], other[k]) for k in value if k not in TIMES)
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(same, value, other))
    return torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def assert_same_run(folder, whole):
    assert rows_of(folder) == rows_of(whole)
    metrics = [json.loads((place / "metrics.json").read_text()) for place in (folder, whole)]
    assert same(*metrics), metrics
    for name in (BEST, LAST):
        contents = [torch.load(place / name, weights_only=True) for place in (folder, whole)]
        for entry in ("state_dict", "optimizer_states"):
            assert same(*(content[entry] for content in contents)), (name, entry)
        assert same(*({"step": content["progress"]["step"]} for content in contents))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run.main(["--opt", write_tiny(folder, **LONG)])
    return folder / "output/tiny"


@pytest.fixture
def stopping(monkeypatch):
    def stop_in(step, *, hook="training_step", signum=signal.SIGTERM, only=lambda module: True):
        """Signals this process while it computes a step, or the validation after it."""
        plain = getattr(PPAPModule, hook)

        def signalled(module, *arguments):
            if module.global_step + (hook == "training_step") == step and only(module):
                os.kill(os.getpid(), signum)
            return plain(module, *arguments)

        monkeypatch.setattr(PPAPModule, hook, signalled)
        return monkeypatch.undo

    return stop_in


@pytest.mark.parametrize(
    ("step", "hook", "signum"),
    [
        (2, "training_step", signal.SIGTERM),
        (5, "training_step", signal.SIGINT),
        (7, "validation_step", signal.SIGTERM),  # a validation that is half done
        (8, "training_step", signal.SIGTERM),  # the last of an epoch
        (12, "validation_step", signal.SIGINT),  # the last of all
    ],
)
def test_signal__saves_leaves_and_goes_on(tiny_file, tmp_path, whole, stopping, step, hook, signum):
    path, folder = tiny_file(**LONG), tmp_path / "output/tiny"
    undo, before = stopping(step, hook=hook, signum=signum), set(tqdm._instances)
    with pytest.raises(Stopped, match=rf"saved in {folder}/last\.ckpt; resume with: .*--resume") as stopped:
        run.main(["--opt", path])
    undo()
    assert stopped.value.status == 128 + signum
    assert set(tqdm._instances) <= before, "an open bar writes whenever it is collected"
    reached = read_progress(folder / LAST)
    assert (reached.step, reached.validated) == (step, hook == "training_step" and step % 4 not in (0, 3))
    run.main(["--opt", path, "--resume"])
    assert_same_run(folder, whole)


@pytest.mark.parametrize("valid_freq", [3, 100])
@pytest.mark.parametrize(
    ("step", "hook"),
    [
        (3, "training_step"),
        (5, "training_step"),
        (7, "training_step"),
        (7, "validation_step"),
        (14, "training_step"),
    ],
)
def test_resume__of_an_epoch_of_seven_steps(tiny_file, tmp_path, sevens, stopping, valid_freq, step, hook):
    """Before, at and after validations that `valid_freq` or the end of an epoch asks for; twice in a row."""
    words = ["--opt", tiny_file(**SEVEN), f"train.valid_freq={valid_freq}"]
    undo = stopping(step, hook=hook)
    with pytest.raises(Stopped):
        run.main(words)
    undo()
    if step < 10:
        undo = stopping(11)
        with pytest.raises(Stopped):
            run.main([*words, "--resume"])
        undo()
    run.main([*words, "--resume"])
    assert_same_run(tmp_path / "output/tiny", sevens[valid_freq])


@pytest.fixture(scope="module")
def sevens(tmp_path_factory):
    """Folders of uninterrupted runs of two epochs of seven steps, by valid_freq."""
    folders = {}
    for valid_freq in (3, 100):
        folder = tmp_path_factory.mktemp("seven")
        run.main(["--opt", write_tiny(folder, **SEVEN), f"train.valid_freq={valid_freq}"])
        folders[valid_freq] = folder / "output/tiny"
        due = [int(row["iters"]) for row in rows_of(folders[valid_freq]) if row["valid_loss"]]
        assert due == {3: [3, 6, 7, 10, 13, 14], 100: [7, 14]}[valid_freq]
    return folders


class Drawing(nn.Module):
    """A user's loss that draws from the global generators of torch, NumPy and Python."""

    def forward(self, z, features, generator=None):
        weights = torch.rand(len(z)) + np.random.rand() + random.random()
        one = torch.ones(())
        return PPAPLossOutput((weights * z[:, 0]).mean(), one, one)


def test_resume__a_loss_that_draws_from_global_generators(tiny_file, tmp_path, stopping):
    register_loss("drawing", lambda options: Drawing())
    try:
        words = ["--opt", tiny_file(**LONG), "training_coeff.loss=drawing"]
        undo = stopping(6)
        with pytest.raises(Stopped):
            run.main(words)
        undo()
        torch.manual_seed(5)
        run.main([*words, "--resume"])
        run.main([*words, "wandb.name=whole"])
    finally:
        LOSSES.remove("drawing")
        del criterion._registered["drawing"]
    assert_same_run(tmp_path / "output/tiny", tmp_path / "output/whole")


def test_validation_due__every_valid_freq_and_at_the_end():
    assert [step + 1 for step in range(7) if validation_due(step, 7, 3)] == [3, 6, 7]
    assert [step + 1 for step in range(7) if validation_due(step, 7, 100)] == [7]


def test_signal__puts_the_handlers_back():
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.signum == signal.SIGTERM
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_signal__a_second_ctrl_c_leaves_at_once(tiny_file, tmp_path, start):
    """The first one waits for a step that never ends."""
    process = start(["--opt", tiny_file(**LONG)], stuck_in_step=3)
    try:
        await_file(tmp_path / "output/tiny/stuck", process)
        for _ in range(2):
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.3)
        process.join(10)
        assert process.exitcode == 128 + signal.SIGINT
    finally:
        process.kill()


def test_signal__in_a_slurm_job_requeues_it(tiny_file, tmp_path, stopping, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NAME", "ppap")
    monkeypatch.setattr("pytorch_lightning.plugins.environments.SLURMEnvironment.detect", lambda: False)
    stopping(2, signum=signal.SIGUSR1)
    with pytest.raises(Stopped, match=r"step 2 of 12.*SLURM job 77 is requeued; resume with"):
        run.main(["--opt", tiny_file(**LONG)])
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


def test_resume__where_nothing_is_validated(tiny_file, tmp_path, stopping):
    (tmp_path / "photos").mkdir()
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.png")
    path = tiny_file(
        **LONG,
        dataset__data_type="directory",
        dataset__data_path=str(tmp_path / "photos"),
        dataset__n_classes=5,
    )
    undo = stopping(7)
    with pytest.raises(Stopped):
        run.main(["--opt", path])
    undo()
    run.main(["--opt", path, "--resume"])
    run.main(["--opt", path, "wandb.name=whole"])
    assert_same_run(tmp_path / "output/tiny", tmp_path / "output/whole")
    assert read_progress(tmp_path / "output/tiny" / BEST).step == 12


def test_resume__a_sweep_goes_on_with_the_run_that_was_left(tiny_file, tmp_path, stopping, capsys):
    words = ["--opt", tiny_file(**LONG), "train.seed=0,1,2"]
    undo = stopping(4, only=lambda module: module.options.train.seed == 1)
    with pytest.raises(Stopped):
        run.main(words)
    undo()
    capsys.readouterr()
    results = run.main([*words, "--resume"])
    told = capsys.readouterr().out
    assert len(results) == 3
    assert "tiny-seed=0: this run is finished" in told
    assert "going on after step 4" in told
    assert "tiny-seed=2 holds nothing to go on from" in told
    assert (tmp_path / "output/tiny-sweep").is_dir()


def test_resume__finished_is_not_run_again(tiny_file, capsys, monkeypatch):
    path = tiny_file()
    (result,) = run.main(["--opt", path])
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("it was trained again"))
    (again,) = run.main(["--opt", path, "resume=auto"])
    assert same(result, again)
    assert "this run is finished" in capsys.readouterr().out


def test_resume__nothing_there_starts(tiny_file, tmp_path, capsys):
    run.main(["--opt", tiny_file(), "--resume"])
    assert "holds nothing to go on from: the run starts" in capsys.readouterr().out
    assert (tmp_path / "output/tiny/metrics.json").exists()


def test_resume__other_options_are_refused(tiny_file, stopping, tmp_path):
    path = tiny_file(**LONG)
    undo = stopping(2)
    with pytest.raises(Stopped):
        run.main(["--opt", path])
    undo()
    with pytest.raises(UserError, match=r"training_coeff\.tau was 0\.8, is 0\.5") as error:
        run.main(["--opt", path, "--resume", "training_coeff.tau=0.5", "dataloader.num_workers=1"])
    assert "num_workers" not in str(error.value)
    assert read_progress(tmp_path / "output/tiny" / LAST).step == 2


def test_resume__names_a_damaged_checkpoint_and_uses_the_best(tiny_file, tmp_path, whole, stopping, capsys):
    path, folder = tiny_file(**LONG), tmp_path / "output/tiny"
    undo = stopping(9)
    with pytest.raises(Stopped):
        run.main(["--opt", path])
    undo()
    content = bytearray((folder / LAST).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / LAST).write_bytes(content)
    run.main(["--opt", path, "--resume"])
    assert "last.ckpt: not a readable checkpoint" in capsys.readouterr().out
    assert_same_run(folder, whole)


def test_checkpoints__come_every_so_many_steps(tiny_file, tmp_path, monkeypatch):
    saved, plain = [], CheckpointManager._save

    def noted(manager, *arguments, **keywords):
        saved.append(manager._now.step)
        plain(manager, *arguments, **keywords)

    monkeypatch.setattr(CheckpointManager, "_save", noted)
    seldom = tiny_file(**LONG | {"train__valid_freq": 100})
    run.main(["--opt", seldom, "train.checkpoint_every=0.00001 min", "wandb.name=minutes"])
    assert saved == list(range(1, 13))  # less than a millisecond
    saved.clear()
    run.main(["--opt", seldom, "train.checkpoint_every=null", "wandb.name=none"])
    assert saved == [4, 8, 12]  # those of validations
    saved.clear()
    run.main(["--opt", seldom, "train.checkpoint_every=2"])
    assert saved == [2, 4, 6, 8, 10, 12]  # each once
    there = {path.name for path in (tmp_path / "output/tiny").glob("*.ckpt")}
    assert there == {BEST, LAST}


@pytest.mark.parametrize("every", ["0", "15 hours", "1.5", "-3", "min"])
def test_checkpoint_every__that_is_no_interval(tiny_options, every):
    with pytest.raises(UserError, match=r"train\.checkpoint_every is .*must be a number of steps"):
        tiny_options(train__checkpoint_every=every)


def hold(folder):
    """Has the lock of a run's folder until it is killed, and tells by a file."""
    with locked(folder):
        (folder.parent / "held").touch()
        time.sleep(600)


def test_lock__two_runs_into_one_folder(tiny_file, tmp_path, forkserver):
    path, folder = tiny_file(), tmp_path / "output/tiny"
    holder = forkserver.Process(target=hold, args=(folder,))
    holder.start()
    try:
        await_file(folder.parent / "held", holder)
        with pytest.raises(UserError, match=r"another run is writing there .*tiny\.lock.*wandb\.name"):
            run.main(["--opt", path])
        assert not folder.exists()
    finally:
        holder.kill()
        holder.join()
    run.main(["--opt", path])  # the lock has fallen with its process


def await_file(path, process):
    while not path.exists():
        assert process.is_alive()
        time.sleep(0.05)


def stay(module, batch, batch_idx, *, step, step_of):
    """A training step that never ends where it is the one that is asked for."""
    if batch_idx + 1 == step:
        (Path(module.options.output_dir) / module.options.wandb.name / "stuck").touch()
        while True:
            time.sleep(0.1)
    return step_of(module, batch, batch_idx)


def run_until(argv, *, renames=None, stuck_in_step=None):
    """run.py in a process of its own.

    It kills itself instead of renaming a file for the n-th time, or never ends a step, with a file to tell.
    """
    multiprocessing.set_start_method("fork", force=True)  # of its loaders, as on the command line
    plain, left = os.replace, [renames]

    def counted(source, target):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(source, target)

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if renames is not None:
        os.replace = counted
    if stuck_in_step is not None:
        PPAPModule.training_step = partialmethod(stay, step=stuck_in_step, step_of=PPAPModule.training_step)
    sys.exit(guarded(lambda: run.main(argv)))


@pytest.fixture(scope="module")
def forkserver():
    """Starts processes that have torch imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "model", "dataset"])
    return context


@pytest.fixture
def start(forkserver):
    def start(argv, **chosen):
        """Starts run.py."""
        process = forkserver.Process(target=run_until, args=(argv,), kwargs=chosen)
        process.start()
        return process

    return start


def test_kill__before_any_rename_of_a_run(tiny_file, tmp_path, whole, start):
    """One run, killed before its 1st, 5th, 9th ... rename, goes on each time from what it has."""
    path, kills = tiny_file(**LONG), 0
    for renames in range(0, 60, 4):
        process = start(["--opt", path, "--resume", "train.checkpoint_every=2"], renames=renames)
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 4
    assert_same_run(tmp_path / "output/tiny", whole)


def cut_short(start, folder, *, kills, seed):
    """Kills runs at random moments of their whole length until `kills` is reached; the finished ones."""
    drawn, finished = random.Random(seed), []
    path, begun = write_tiny(folder, **LONG, dataloader__num_workers=1), time.perf_counter()
    start(["--opt", path]).join(300)
    length = time.perf_counter() - begun
    while kills > 0:
        name = f"cut{len(finished)}"
        while True:
            process = start(["--opt", path, "--resume", f"wandb.name={name}", "train.checkpoint_every=2"])
            process.join(drawn.uniform(0, length) if kills > 0 else 300)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills -= 1
        assert process.exitcode == 0
        finished.append(folder / "output" / name)
    return finished


def test_kill__at_random_moments(tmp_path, whole, start):
    for folder in cut_short(start, tmp_path, kills=4, seed=0):
        assert_same_run(folder, whole)


@pytest.mark.slow
def test_kill__at_twenty_random_moments(tmp_path, whole, start):
    for folder in cut_short(start, tmp_path, kills=20, seed=1):
        assert_same_run(folder, whole)
