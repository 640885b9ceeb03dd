"""The folder of a run: its lock, its first files, and what an earlier start has left in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils.config.loading import as_tree, flatten
from utils.config.options import Options
from utils.errors import UserError
from utils.files import make_folder, move_aside, read_json_object, write_json
from utils.training.checkpointing import BEST, LAST, Progress, read_progress
from utils.training.launch import is_rank_zero
from utils.training.provenance import hardware, provenance

MAY_DIFFER = (  # what decides where and how fast a run computes, not what
    "checkpoint",
    "dataloader.num_workers",
    "dataset.check_files",
    "dataset.data_path",
    "eval.crf_workers",
    "gpu_ids",
    "output_dir",
    "resume",
    "train.checkpoint_every",
)


@dataclass(frozen=True)
class Saved:
    path: Path
    progress: Progress


def newest_complete(folder):
    for name in (LAST, BEST):
        if (folder / name).is_file():
            try:
                return Saved(folder / name, read_progress(folder / name))
            except UserError as error:
                print(f"{error}; the one before it is used")
    return None


@dataclass(frozen=True)
class Earlier:
    """What an earlier start has left: the whole result, a checkpoint to go on from, or neither."""

    result: dict[str, Any] | None = None
    saved: Saved | None = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a run's folder for this process; the lock falls with the process, however it ends.

    Of several processes the first holds it for all.

    Raises:
        UserError: another run has it.
    """
    if not is_rank_zero():
        yield
        return
    path = folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0).acquire()
    except Timeout:
        raise UserError(
            f"{folder}: another run is writing there (it holds {path}); wait for it, or give this one "
            "another wandb.name or output_dir"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another output_dir") from None
    with lock:
        yield


def earlier_run(options: Options, folder: Path) -> Earlier:
    """What `resume` finds.

    Args:
        options: of this start.
        folder: of the run.

    Raises:
        UserError: the folder is of a run with other options.
    """
    if options.resume is None:
        return Earlier()
    if not (folder / "options.json").exists():
        print(f"{folder} holds nothing to go on from: the run starts")
        return Earlier()
    _require_same(options, folder / "options.json")
    metrics = folder / "metrics.json"
    if metrics.exists() and "train_hours" in (result := read_json_object(metrics)):  # the last to be added
        print(f"{folder}: this run is finished")
        return Earlier(result=result)
    saved = newest_complete(folder)
    if saved is None:
        print(f"{folder} holds no whole checkpoint yet: the run starts again")
        return Earlier()
    print(f"going on after step {saved.progress.step:,}, from {saved.path}")
    return Earlier(saved=saved)


def begin(folder: Path, options: Options, *, left_out: Sequence[str]) -> None:
    """Makes the folder of a run that starts, with what it was started with; moves an earlier run aside.

    Of several processes the first does so.

    Args:
        folder: of the run.
        options: all options.
        left_out: damaged files, and what is wrong with each.

    Raises:
        UserError: it cannot be written.
    """
    if not is_rank_zero():
        return
    if (earlier := move_aside(folder)) is not None:
        print(f"{folder} held an earlier run, now in {earlier}")
    make_folder(folder)
    write_json(folder / "options.json", as_tree(options))
    write_json(folder / "provenance.json", provenance() | {"hardware": hardware()})
    if left_out:
        write_json(folder / "left_out.json", list(left_out))


def _require_same(options: Options, path: Path) -> None:
    before = flatten(as_tree(Options())) | flatten(read_json_object(path))
    now = flatten(as_tree(options))
    differing = [
        f"{key} was {json.dumps(before[key])}, is {json.dumps(value)}"
        for key, value in now.items()
        if before[key] != value and not key.startswith(("wandb.", "trainer.")) and key not in MAY_DIFFER
    ]
    if differing:
        mend = "give the options of that run, or start another one under another wandb.name"
        raise UserError([*differing, mend], f"{path}, which the run would go on from")
