"""A run that is cut short and goes on is the run that was never cut short, bit for bit."""

import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run
from model.module import PPAPModule
from model.saving import Saver
from tests.conftest import write_tiny
from utils.checkpoints import BEST, LAST, PREVIOUS, newest_complete, read_progress
from utils.cli import guarded
from utils.errors import UserError
from utils.stopping import Stopped, StopRequest

REPOSITORY = Path(__file__).resolve().parents[1]
TIMES = {"images_per_s", "train_hours", "peak_memory_gib", "checkpoint"}
LONG = {"train__epoch": 3, "train__valid_freq": 3, "train__print_freq": 1, "eval__is_crf": False}  # 12 steps


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def same(value, other):
    """Equal to the last bit, tensors too; times left out."""
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
    def stop_in(step, *, hook="training_step", signum=signal.SIGTERM):
        """Has this process signalled where a step, or the validation after it, is computed."""
        plain = getattr(PPAPModule, hook)

        def signalled(module, *arguments):
            if module.iters + (hook == "training_step") == step:
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
    undo = stopping(step, hook=hook, signum=signum)
    with pytest.raises(Stopped, match=rf"saved in {folder}/last\.ckpt; go on with: .*--resume") as stopped:
        run.main(["--opt", path])
    undo()
    assert stopped.value.status == 128 + signum
    reached = read_progress(folder / LAST)
    assert (reached.step, reached.validated) == (step, hook == "training_step" and step % 4 not in (0, 3))
    run.main(["--opt", path, "--resume"])
    assert_same_run(folder, whole)


def test_signal__puts_the_handlers_back():
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.signum == signal.SIGTERM
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


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
    assert newest_complete(tmp_path / "output/tiny").progress.step == 2


def test_resume__a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tiny_file, tmp_path, whole, stopping, capsys
):
    path, folder = tiny_file(**LONG), tmp_path / "output/tiny"
    undo = stopping(9)
    with pytest.raises(Stopped):
        run.main(["--opt", path])
    undo()
    assert read_progress(folder / PREVIOUS).step == 8
    content = bytearray((folder / LAST).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / LAST).write_bytes(content)
    run.main(["--opt", path, "--resume"])
    told = capsys.readouterr().out
    assert "last.ckpt: damaged (its content is not that of its SHA-256); the one before it is used" in told
    assert "going on after step 8" in told
    assert_same_run(folder, whole)


def test_checkpoints__come_every_so_many_steps_and_two_are_kept(tiny_file, tmp_path, monkeypatch):
    saved = []
    plain = Saver._save
    monkeypatch.setattr(
        Saver, "_save", lambda self, *a, **k: [saved.append(self._at.step), plain(self, *a, **k)]
    )
    run.main(["--opt", tiny_file(**LONG | {"train__valid_freq": 100}), "train.checkpoint_every=2"])
    assert saved == [2, 4, 6, 8, 10, 12]  # each once, those of a validation too
    there = {path.name for path in (tmp_path / "output/tiny").glob("*.ckpt")}
    assert there == {BEST, LAST, PREVIOUS}
    assert read_progress(tmp_path / "output/tiny" / PREVIOUS).step == 10


@pytest.mark.parametrize("every", ["0", "15 hours", "1.5", "-3", "min"])
def test_checkpoint_every__that_is_no_interval(tiny_options, every):
    with pytest.raises(UserError, match=r"train\.checkpoint_every is .*must be a number of steps"):
        tiny_options(train__checkpoint_every=every)


def test_lock__two_runs_into_one_folder(tiny_file, tmp_path):
    """The second is another process, as the lock is one of processes."""
    path = tiny_file()
    code = (
        "import sys; from utils.runfolder import locked; from pathlib import Path\n"
        f"with locked(Path({str(tmp_path / 'output/tiny')!r})): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(
            UserError, match=r"another run is writing there .*tiny\.lock.*another wandb\.name"
        ):
            run.main(["--opt", path])
        assert not (tmp_path / "output/tiny").exists()
    finally:
        holder.kill()
        holder.communicate()
    run.main(["--opt", path])  # the lock has fallen with its process


def run_until(argv, *, renames=None):
    """run.py in a process of its own, which kills itself instead of renaming a file for the n-th time."""
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
    sys.exit(guarded(lambda: run.main(argv)))


@pytest.fixture(scope="module")
def start():
    """Starts run.py in a process that has torch imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "model", "dataset"])

    def start(argv, **chosen):
        process = context.Process(target=run_until, args=(argv,), kwargs=chosen)
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
