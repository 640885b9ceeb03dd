"""A run that is interrupted and resumed equals the uninterrupted run, bit for bit."""

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

import run
from loss import PPAPLossOutput
from model import register_loss
from model.callbacks import HtmlReport
from model.methods import ppap
from model.module import PPAPModule
from tests.conftest import METHODS, needs_pydensecrf, without_figures, write_tiny
from tests.dataset.files import picture, save
from utils.config.cli import guarded
from utils.config.options import LOSSES
from utils.errors import Interrupted, UserError, exit_on_signals
from utils.training.checkpointing import CheckpointManager
from utils.training.run_dir import BEST, LAST, RunDir
from utils.training.stopping import Stopped, StopSignal
from utils.vision.crf import CrfPool

TIMES = {"images_per_s", "train_hours", "step_seconds", "peak_memory_gib", "checkpoint"}
LONG = {"train__epoch": 3, "train__valid_freq": 3, "train__print_freq": 1, "eval__is_crf": False}  # 12 steps
SEVEN = LONG | {"train__epoch": 2, "dataset__train_images": 30}  # 14 steps, 7 per epoch


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def progress_of(path):
    return torch.load(path, weights_only=True)["progress"]


def same(value, other):
    """Whether two values, possibly nested and of tensors, are equal, times excepted."""
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
        assert same(*(content["progress"]["step"] for content in contents))


@pytest.fixture(scope="module", autouse=True)
def fast():
    with without_figures():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run.main(["--opt", write_tiny(folder, **LONG)])
    return folder / "output/tiny"


@pytest.fixture(scope="module")
def sevens(tmp_path_factory):
    """Folders of uninterrupted runs of two epochs of seven steps, by valid_freq."""
    folders = {}
    for valid_freq, expected in ((3, [3, 6, 7, 10, 13, 14]), (100, [7, 14])):
        folder = tmp_path_factory.mktemp("seven")
        run.main(["--opt", write_tiny(folder, **SEVEN), f"train.valid_freq={valid_freq}"])
        folders[valid_freq] = folder / "output/tiny"
        rows = rows_of(folders[valid_freq])
        assert [int(row["iters"]) for row in rows if row["valid_loss"]] == expected
    return folders


@pytest.fixture
def stop_in(monkeypatch):
    def stop_in(step, words, *, hook="training_step", signum=signal.SIGTERM, seed=0):
        """Runs until a signal stops the run in a step, or in the validation after it; returns the error."""
        plain = getattr(PPAPModule, hook)

        def signalled(module, *arguments):
            now = module.global_step + (hook == "training_step")
            if now == step and module.options.train.seed == seed:
                os.kill(os.getpid(), signum)
            return plain(module, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(PPAPModule, hook, signalled)
            with pytest.raises(Stopped) as stopped:
                run.main(words)
        return stopped.value

    return stop_in


@pytest.mark.parametrize(
    ("step", "hook", "signum"),
    [
        (2, "training_step", signal.SIGINT),
        (7, "validation_step", signal.SIGTERM),  # a validation that is half done
        (8, "training_step", signal.SIGUSR1),  # the last of an epoch
        (12, "validation_step", signal.SIGINT),  # the last of all
    ],
)
def test_signal__saves_stops_and_resumes(tiny_file, tmp_path, whole, stop_in, step, hook, signum):
    words, folder = ["--opt", tiny_file(**LONG)], tmp_path / "output/tiny"
    before = set(tqdm._instances)
    stopped = stop_in(step, words, hook=hook, signum=signum)
    assert f"at step {step} of 12, saved in {folder}/last.ckpt" in str(stopped)
    assert stopped.status == 128 + signum
    assert set(tqdm._instances) <= before, "an open bar writes whenever it is collected"
    reached = progress_of(folder / LAST)
    assert (reached["step"], reached["validated"]) == (step, step == 2)
    run.main([*words, "--resume"])
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("valid_freq", "step", "hook"),
    [(3, 7, "validation_step"), (3, 14, "training_step"), (100, 5, "training_step")],
)
def test_resume__of_an_epoch_of_seven_steps(tiny_file, tmp_path, sevens, stop_in, valid_freq, step, hook):
    """Before and after validations due by `valid_freq` or an epoch's end; stopped twice in a row."""
    words = ["--opt", tiny_file(**SEVEN), f"train.valid_freq={valid_freq}"]
    stop_in(step, words, hook=hook)
    if step < 11:
        stop_in(11, [*words, "--resume"])
    run.main([*words, "--resume"])
    assert_same_run(tmp_path / "output/tiny", sevens[valid_freq])


@pytest.mark.parametrize("steps", [6, 12])  # within and at the end of an epoch
def test_resume__with_max_steps_in_the_last_validation(tiny_file, tmp_path, stop_in, steps):
    words = ["--opt", tiny_file(**LONG | {"train__epoch": 9}), f"train.max_steps={steps}"]
    stop_in(steps, words, hook="validation_step")
    run.main([*words, "--resume"])
    run.main([*words, "wandb.name=uninterrupted"])
    assert_same_run(tmp_path / "output/tiny", tmp_path / "output/uninterrupted")


@pytest.mark.parametrize("per_epoch", [1, 4])
def test_resume__with_max_steps_from_the_end_of_an_epoch(tiny_file, tmp_path, stop_in, per_epoch):
    path = tiny_file(**LONG | {"train__epoch": 9, "dataset__train_images": 4 * per_epoch})
    words = ["--opt", path, f"train.max_steps={3 * per_epoch}"]
    stop_in(per_epoch, words)
    run.main([*words, "--resume"])
    run.main([*words, "wandb.name=uninterrupted"])
    assert_same_run(tmp_path / "output/tiny", tmp_path / "output/uninterrupted")


class Drawing(nn.Module):
    """A user's loss that draws from the global generators of torch, NumPy and Python."""

    def forward(self, z, features, generator=None):
        weights = torch.rand(len(z)) + np.random.rand() + random.random()
        one = torch.ones(())
        return PPAPLossOutput((weights * z[:, 0]).mean(), one, one)


def test_resume__a_loss_that_draws_from_global_generators(tiny_file, tmp_path, stop_in):
    register_loss("drawing", lambda options: Drawing())
    try:
        words = ["--opt", tiny_file(**LONG | {"train__epoch": 2}), "training_coeff.loss=drawing"]
        stop_in(6, words)
        torch.manual_seed(5)
        run.main([*words, "--resume"])
        run.main([*words, "wandb.name=whole"])
    finally:
        LOSSES.remove("drawing")
        del ppap._registered["drawing"]
    assert_same_run(tmp_path / "output/tiny", tmp_path / "output/whole")


@pytest.mark.parametrize("method", METHODS)
def test_resume__of_other_methods(tiny_file, tmp_path, stop_in, method):
    """Before and after HP renews its pools, which it does before the fourth step of an epoch.

    STEGO's neighbours are in the checkpoint, so that losing the stored table changes nothing.
    """
    words = ["--opt", tiny_file(**LONG | METHODS[method])]
    run.main([*words, "wandb.name=whole"])
    for step in (2, 7):
        stop_in(step, [*words, "--resume"])
        for table in (tmp_path / "output/tokens").glob("neighbours-*"):
            other = np.zeros_like(np.load(table))
            with table.open("wb") as file:
                np.save(file, other)
    run.main([*words, "--resume"])
    assert_same_run(tmp_path / "output/tiny", tmp_path / "output/whole")


def test_signal__restores_the_handlers():
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def last_step():
        with StopSignal() as stop:
            stop.listen()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="143"):
        last_step()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_signal__a_second_ctrl_c_exits_at_once(tiny_file, tmp_path, start):
    """The first one waits for a step that never ends."""
    process = start(["--opt", tiny_file(**LONG)], stuck_in_step=3)
    try:
        while not (tmp_path / "output/tiny/stuck").exists():
            assert process.is_alive()
            time.sleep(0.05)
        for _ in range(2):
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.3)
        process.join(120)
        assert process.exitcode == 128 + signal.SIGINT
    finally:
        process.kill()


@pytest.fixture
def photos(tiny_file, tmp_path):
    """Arguments of a run of 8 steps on 16 photographs without labels."""
    for number in range(16):
        save(tmp_path / f"photos/{number:02}.png", picture(number))
    data = {"data_type": "directory", "data_path": str(tmp_path / "photos"), "n_classes": 5}
    changed = {f"dataset__{key}": value for key, value in data.items()}
    return ["--opt", tiny_file(**LONG | changed | {"train__epoch": 2})]


def test_resume__without_validation_images(photos, tmp_path, stop_in):
    stop_in(3, photos)
    run.main([*photos, "--resume"])
    run.main([*photos, "wandb.name=whole"])
    assert_same_run(tmp_path / "output/tiny", tmp_path / "output/whole")
    assert progress_of(tmp_path / "output/tiny" / BEST)["step"] == 8


def test_resume__on_other_data(photos, tmp_path, stop_in):
    """Refused with the first difference; other_data continues, and so does the same data elsewhere."""
    words = [*photos, "--resume"]
    stop_in(2, words)
    (tmp_path / "photos").rename(tmp_path / "moved")
    stop_in(4, [*words, f"dataset.data_path={tmp_path}/moved"])
    (tmp_path / "moved").rename(tmp_path / "photos")
    save(tmp_path / "photos/99.png", picture(99))
    with pytest.raises(UserError, match=r"train: 99\.png: size none then, [\d,]+ now.*resume_on_other"):
        run.main(words)
    (tmp_path / "photos/99.png").unlink()
    (tmp_path / "photos/00.png").unlink()
    with pytest.raises(UserError, match=r"train: 00\.png: size [\d,]+ then, none now"):
        run.main(words)
    save(tmp_path / "photos/00.png", picture(99))
    assert run.main([*words, "resume_on_other_data=true"])[0]["step"] == 8


def test_resume__continues_a_sweep(tiny_file, tmp_path, stop_in, capsys):
    words = ["--opt", tiny_file(**LONG | {"train__epoch": 1}), "train.seed=0,1,2"]
    stop_in(2, words, seed=1)
    capsys.readouterr()
    assert len(run.main([*words, "--resume"])) == 3
    printed = capsys.readouterr().out
    assert "tiny-seed=0: this run is finished" in printed
    assert "resuming after step 2" in printed
    assert "tiny-seed=2: no checkpoint to resume from" in printed
    assert (tmp_path / "output/tiny-sweep").is_dir()


def test_resume__a_finished_run_or_other_options(whole, capsys, monkeypatch):
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("it was trained again"))
    words = ["--opt", str(whole.parent.parent / "tiny.json"), "--resume"]
    (result,) = run.main(words)
    assert same(result, json.loads((whole / "metrics.json").read_text()))
    assert "this run is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"training_coeff\.tau was 0\.8, is 0\.5") as error:
        run.main([*words, "training_coeff.tau=0.5", "dataloader.num_workers=1"])
    assert "num_workers" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "before", "after", "unit", "step"),
    [
        ("train.epoch", 1, 2, "epochs", 7),
        ("train.max_steps", 6, 10, "steps", 6),
        ("train.max_steps", 7, 14, "steps", 7),  # from the end of an epoch
    ],
)
def test_resume__a_longer_run_continues_a_finished_one(
    tiny_file, tmp_path, capsys, key, before, after, unit, step
):
    """As if the run had been of this length from the start."""
    words, folder = ["--opt", tiny_file(**SEVEN)], tmp_path / "output/tiny"
    run.main([*words, f"{key}={before}"])
    (longer,) = run.main([*words, "--resume", f"{key}={after}"])
    printed = capsys.readouterr().out
    assert f"{before} {unit} become {after}" in printed
    assert f"resuming after step {step}" in printed
    assert (folder / f"metrics-{before}-{unit}.json").exists()
    (whole,) = run.main([*words, f"{key}={after}", "wandb.name=whole"])
    assert same(longer, whole)
    assert rows_of(folder) == rows_of(tmp_path / "output/whole")
    with pytest.raises(UserError, match=f"{key} was {after}, is {before}"):
        run.main([*words, "--resume", f"{key}={before}"])


def test_resume__a_run_without_its_best_checkpoint_ends_with_results(tiny_file, tmp_path, stop_in, capsys):
    words, folder = ["--opt", tiny_file(**LONG)], tmp_path / "output/tiny"
    stop_in(9, words)
    (folder / BEST).unlink()
    (result,) = run.main([*words, "--resume"])
    assert "best.ckpt is damaged or missing; step 9 takes its place" in capsys.readouterr().out
    assert result["step"] in (11, 12)  # the validations that followed


def test_resume__draws_what_a_finished_training_lacks(tiny_file, tmp_path, monkeypatch):
    words, folder = ["--opt", tiny_file(**LONG | {"train__epoch": 1})], tmp_path / "output/tiny"
    with monkeypatch.context() as patch:
        patch.setattr(HtmlReport, "finish", Mock(side_effect=Interrupted(143)))
        with pytest.raises(Interrupted):
            run.main(words)
    assert "Training: step 4 of 4" in (folder / "report.html").read_text()
    run.main([*words, "--resume"])
    assert "Finished: " in (folder / "report.html").read_text()


def test_resume__skips_a_damaged_checkpoint(tiny_file, tmp_path, whole, stop_in, capsys):
    words, folder = ["--opt", tiny_file(**LONG)], tmp_path / "output/tiny"
    stop_in(9, words)
    content = bytearray((folder / LAST).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / LAST).write_bytes(content)
    run.main([*words, "--resume"])
    assert "last.ckpt: not a readable checkpoint" in capsys.readouterr().out
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("every", "expected"), [("0.00001 min", [1, 2, 3, 4, 5, 6, 7, 8]), ("null", [4, 8]), ("3", [3, 4, 6, 8])]
)
def test_checkpoint_every__steps_or_minutes(tiny_file, tmp_path, monkeypatch, every, expected):
    saved, plain = [], CheckpointManager._save

    def noted(manager, *arguments, **keywords):
        saved.append(manager.progress.step)
        plain(manager, *arguments, **keywords)

    monkeypatch.setattr(CheckpointManager, "_save", noted)
    path = tiny_file(**LONG | {"train__valid_freq": 100, "train__epoch": 2})
    run.main(["--opt", path, f"train.checkpoint_every={every}"])
    assert saved == expected  # each once, and those of validations
    assert {path.name for path in (tmp_path / "output/tiny").glob("*.ckpt")} == {BEST, LAST}


def test_lock__two_runs_in_one_folder(tiny_file, tmp_path, tiny_options):
    with (
        RunDir(tiny_options()).lock(),
        pytest.raises(UserError, match=r"in use by process .*tiny\.lock.*wandb\.name"),
    ):
        run.main(["--opt", tiny_file()])
    assert not (tmp_path / "output/tiny").exists()


def stay(module, batch, batch_idx, *, step, step_of):
    """A training step that never ends if it is the chosen one."""
    if batch_idx + 1 == step:
        (Path(module.options.output_dir) / module.options.wandb.name / "stuck").touch()
        time.sleep(600)
    return step_of(module, batch, batch_idx)


def hang(pool, *_, pids):
    """Waits in the CRF for ever, after its process has started; writes the pids of all children."""
    pool.submit(int).result()
    pids.write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
    time.sleep(600)


def run_until(argv, *, renames=None, stuck_in_step=None, stuck_in_crf=None, figures=False):
    """run.py in its own process, which kills itself after `renames` files, or hangs in a step or the CRF."""
    multiprocessing.set_start_method("fork", force=True)  # of its loaders, as on the command line
    exit_on_signals()
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
    if stuck_in_crf is not None:
        CrfPool.refine = partialmethod(hang, pids=stuck_in_crf)
    with nullcontext() if figures else without_figures():
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


@needs_pydensecrf
def test_kill__no_child_stays_behind(tiny_file, tmp_path, start):
    """The main process is killed in the CRF, while the loader's workers are alive as well."""
    pids = tmp_path / "pids"
    options = {"eval__is_crf": True, "eval__crf_backend": "pydensecrf", "dataloader__num_workers": 1}
    process = start(["--opt", tiny_file(**LONG | options)], stuck_in_crf=pids)
    while not (pids.exists() and pids.read_text()):
        assert process.is_alive()
        time.sleep(0.05)
    children = pids.read_text().split()
    assert len(children) >= 2
    process.kill()
    process.join()
    assert_all_end(children)


def assert_all_end(pids):
    """Waits for processes; a minute, as the machine may be busy."""
    late = time.monotonic() + 60
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < late, left
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def test_kill__before_renames(tiny_file, tmp_path, whole, start):
    """Kills one run before its 1st, 4th, 7th ... rename; it resumes each time."""
    path, kills = tiny_file(**LONG), 0
    for renames in range(0, 60, 3):
        process = start(["--opt", path, "--resume", "train.checkpoint_every=2"], renames=renames)
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 4
    assert_same_run(tmp_path / "output/tiny", whole)


def descendants(pid):
    """The processes that a process has started, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return [*children, *(each for child in children for each in descendants(child))]


@pytest.mark.parametrize(("kills", "full"), [(2, False), pytest.param(50, True, marks=pytest.mark.slow)])
def test_kill__at_random_moments(tmp_path, whole, start, kills, full):
    """Resumes after each kill; `full`: also in the CRF and while pictures are drawn."""
    drawn, finished, longest = random.Random(kills), 0, 5
    path = write_tiny(tmp_path, **LONG | {"eval__is_crf": full}, dataloader__num_workers=1)
    words = ["--opt", path, "--resume", "train.checkpoint_every=2"]
    if full:
        began, whole = time.monotonic(), tmp_path / "output/whole"
        start([*words, "wandb.name=whole"], figures=True).join(600)
        longest = time.monotonic() - began
    while kills > 0 or not finished:
        process = start([*words, f"wandb.name=cut{finished}"], figures=full)
        process.join(drawn.uniform(0, longest) if kills > 0 else 600)
        if process.exitcode is None:
            started = descendants(process.pid)
            process.kill()
            process.join()
            assert_all_end(started)
            kills -= 1
            continue
        assert process.exitcode == 0
        assert_same_run(tmp_path / f"output/cut{finished}", whole)
        finished += 1
