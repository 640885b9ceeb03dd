"""Faults from outside the program: the message says what to do, and the run resumes from what was saved."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data._utils import signal_handling

import dataset
import eval as evaluation
import run
from model import results
from model.module import PPAPModule
from tests.conftest import needs_pydensecrf
from tests.dataset.files import picture, save
from tests.test_resume import LONG, assert_same_run, fast, whole  # noqa: F401
from utils.config.cli import guarded
from utils.errors import NotFinite, UserError, exit_on_signals
from utils.files import REPOSITORY
from utils.training.checkpointing import AtomicCheckpointIO
from utils.training.stopping import Stopped
from utils.vision.crf import CrfPool


@pytest.fixture
def fault_at(monkeypatch):
    def fault_at(step, fault):
        """Passes the losses of a step through `fault`, which may change them or raise; returns an undo."""
        plain, target = PPAPModule.losses, step

        def faulty(module, batch, *, step, **position):
            losses = plain(module, batch, step=step, **position)
            return fault(losses) if step == target else losses

        monkeypatch.setattr(PPAPModule, "losses", faulty)
        return monkeypatch.undo

    return fault_at


def not_a_number(losses):
    values, statistics = losses
    return values | {"linear_loss": values["linear_loss"] * torch.nan}, statistics


def saved(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def test_full_disk__while_saving(tiny_file, tmp_path, whole, fault_at):  # noqa: F811
    """After step 5 no file of this process may grow beyond 10 kB."""
    path, folder = tiny_file(**LONG), tmp_path / "output/tiny"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(losses):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        return losses

    undo = fault_at(5, fill)
    try:
        with pytest.raises(UserError, match=r"\.ckpt: cannot be written .*is intact"):
            run.main(["--opt", path])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    undo()
    assert saved(folder)["progress"]["step"] == 4
    assert not list(folder.glob("*.part"))
    run.main(["--opt", path, "--resume"])
    assert_same_run(folder, whole)


def test_nonfinite__stops_with_step_parts_and_images(tiny_file, tmp_path, fault_at):
    fault_at(6, not_a_number)
    with pytest.raises(NotFinite, match=r"step 6") as error:
        run.main(["--opt", tiny_file(**LONG)])
    named = [line for line in str(error.value).splitlines() if "synthetic train scene" in line]
    assert len(named) == 4
    assert saved(tmp_path / "output/tiny")["progress"]["step"] == 4


def test_nonfinite__a_step_is_skipped_and_counted(tiny_file, tmp_path, fault_at):
    fault_at(6, not_a_number)
    run.main(["--opt", tiny_file(**LONG), "train.skip_nonfinite=true"])
    content = saved(tmp_path / "output/tiny")
    assert content["ppap"]["skipped_steps"] == 1
    assert content["progress"]["step"] == 12
    steps = {int(state["step"]) for state in content["optimizer_states"][0]["state"].values()}
    assert steps == {11}  # all but one have changed the weights
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


@pytest.fixture
def photographs(tmp_path):
    for number in range(16):
        save(tmp_path / f"photos/{number}.png", picture(number))
    return {
        "dataset__data_type": "directory",
        "dataset__data_path": str(tmp_path / "photos"),
        "dataset__n_classes": 5,
        "dataloader__num_workers": 2,
        "train__epoch": 6,
    }


@pytest.mark.parametrize("words", [[], ["--images", "photo.png", "--out", "masks"], ["--export", "out.pth"]])
def test_flipped_bit__another_checkpoint_takes_its_place(tmp_path, whole, monkeypatch, capsys, words):  # noqa: F811
    """In best.ckpt of a run; without a second checkpoint it is an error that names the file."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "photo.png", picture(0))
    (folder := tmp_path / "run").mkdir()
    content = bytearray((whole / "best.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "best.ckpt").write_bytes(content)
    words = ["--checkpoint", "run", *words, "eval.is_crf=false"]
    with pytest.raises(UserError, match=r"best\.ckpt: not a readable checkpoint"):
        evaluation.main(words)
    with pytest.raises(UserError, match=r"best\.ckpt: not a readable checkpoint"):  # on resume
        AtomicCheckpointIO().load_checkpoint("run/best.ckpt")
    shutil.copy(whole / "last.ckpt", folder)
    evaluation.main(words)
    assert "trying the next checkpoint" in capsys.readouterr().out


@pytest.fixture
def program_handlers():
    """Signals interrupt this process as they do the program."""
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    exit_on_signals()
    yield
    for each, handler in handlers.items():
        signal.signal(each, handler)


def signalled(function, signum):
    """The function, after the process has sent itself a signal."""

    def wrapped(*arguments, **keywords):
        os.kill(os.getpid(), signum)
        return function(*arguments, **keywords)

    return wrapped


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (dataset, "build_data"),
        (PPAPModule, "validation_step"),
        pytest.param(CrfPool, "refine", marks=needs_pydensecrf),
        (results, "write_pictures"),
    ],
)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("program_handlers")
def test_signal__in_an_evaluation(whole, tmp_path, monkeypatch, capsys, place, name, signum):  # noqa: F811
    """Before, during and after the forward passes, and in the CRF."""
    monkeypatch.setattr(place, name, signalled(getattr(place, name), signum))
    words = ["--checkpoint", str(whole), f"output_dir={tmp_path}", "eval.is_crf=true"]
    assert guarded(lambda: evaluation.main([*words, "eval.crf_backend=pydensecrf"])) == 128 + signum
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.usefixtures("program_handlers")
def test_signal__while_tokens_are_cached(tiny_file, tmp_path, monkeypatch):
    """There is nothing to save yet, so the run exits at once; its next start caches them."""
    words = ["--opt", tiny_file(dataset__cache_features="disk", eval__is_crf=False)]
    with monkeypatch.context() as patch:
        patch.setattr(PPAPModule, "frozen_tokens", signalled(PPAPModule.frozen_tokens, signal.SIGTERM))
        assert guarded(lambda: run.main(words)) == 128 + signal.SIGTERM
    assert not list((tmp_path / "output/tokens").glob("train-*"))
    run.main([*words, "--resume"])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal__during_the_first_imports(tmp_path, signum):
    (tmp_path / "hydra.py").write_text(f"import os\nos.kill(os.getpid(), {int(signum)})\n")
    words = [sys.executable, "run.py", "--opt", "demo.json"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signum, "")


@pytest.mark.parametrize(
    ("words", "stdout", "status", "message"),
    [
        ("--print-options", "| head -0", 141, ""),
        ("--print-options", "> /dev/full", 2, "standard output: "),
        ("--debug train.max_steps=1 train.compare_frozen=false", "| head -0", 141, ""),
    ],
)
def test_stdout__that_cannot_be_written(tiny_file, words, stdout, status, message):
    words = f"--opt {tiny_file()} {words} {stdout}"
    command = f"{sys.executable} -u run.py {words}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.startswith(f"error: {message}" if message else "")
    assert done.stderr.count("\n") == bool(message)


def test_loader__missing_images_and_killed_workers(tiny_file, tmp_path, photographs, fault_at, monkeypatch):
    """An image goes missing, then the workers are killed; the run resumes after both."""
    path, folder = tiny_file(**LONG | photographs), tmp_path / "photos"
    run.main(["--opt", path, "wandb.name=whole"])

    def hide(losses):
        folder.rename(tmp_path / "elsewhere")
        return losses

    undo = fault_at(5, hide)
    with pytest.raises(UserError, match=rf"^{folder}/\d+\.png: not a readable image \(.*No such file"):
        run.main(["--opt", path])
    undo()
    (tmp_path / "elsewhere").rename(folder)
    reached = saved(tmp_path / "output/tiny")["progress"]["step"]
    assert 5 <= reached < 24

    def kill(losses):
        for child in multiprocessing.active_children():
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # PyTorch's handler would raise here
        return losses

    def kill_while_stopping(losses):
        os.kill(os.getpid(), signal.SIGTERM)
        return kill(losses)

    undo = fault_at(reached + 1, kill)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # as in a new process
    with pytest.raises(UserError, match=r"worker process was killed .*num_workers"):
        run.main(["--opt", path, "--resume"])
    undo()
    assert saved(tmp_path / "output/tiny")["progress"]["step"] > reached
    undo = fault_at(saved(tmp_path / "output/tiny")["progress"]["step"] + 1, kill_while_stopping)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    with pytest.raises(Stopped, match=r"^at step \d+ of 24"):
        run.main(["--opt", path, "--resume"])
    undo()
    run.main(["--opt", path, "--resume", "dataloader.num_workers=0"])
    assert_same_run(tmp_path / "output/tiny", tmp_path / "output/whole")
