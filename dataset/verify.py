"""Reads every file before a run (--check), to report damaged items or skip them (dataset.skip_damaged)."""

from collections.abc import Callable, Sequence
from functools import partial

from torch.utils.data import DataLoader

from dataset.base import Source, classes_of
from utils.errors import UserError, listed
from utils.progress import Bar, print_once
from utils.training.device import explained_errors
from utils.training.stopping import worker_settings

_checked: dict[str, list[str]] = {}  # by digest: the runs of a sweep read the same files once


def in_workers(task: Callable[[int], str], indices: Sequence[int], *, workers: int, **bar: str) -> list[str]:
    """The results of a task for each index, with a DataLoader as the pool; `bar` is for the progress bar."""
    loader = DataLoader(indices, batch_size=None, collate_fn=task, **worker_settings(workers))
    with explained_errors():
        return list(Bar(loader, **bar))


def _message(source: Source, index: int) -> str:
    """The error message of an item, "" if it is sound."""
    try:
        classes_of(source.read(index), source, index)
    except UserError as error:
        return str(error)
    return ""


def sound_items(
    sources: dict[str, Source], *, skip: bool, workers: int
) -> tuple[dict[str, list[int]], list[str]]:
    """Reads every image and label; returns the sound items of each split and a message per damaged one."""
    digests = {split: source.digest() for split, source in sources.items()}
    for split, source in sources.items():
        if digests[split] not in _checked:
            task, shown = partial(_message, source), {"desc": f"checking {split} files", "unit": "item"}
            _checked[digests[split]] = in_workers(task, range(len(source)), workers=workers, **shown)
    messages = {digest: _checked[digest] for digest in digests.values()}  # two splits may be the same
    damaged = [line for lines in messages.values() for line in lines if line]
    if damaged:
        count = f"{len(damaged)} of {sum(map(len, messages.values()))} images or labels are damaged"
        if not skip:
            hint = "fix or remove them, or skip them with dataset.skip_damaged=true"
            raise UserError(listed(f"{count}; {hint}", damaged))
        print_once(listed(f"{count} and skipped (dataset.skip_damaged)", damaged))
    sound = {
        split: [i for i, line in enumerate(messages[digest]) if not line] for split, digest in digests.items()
    }
    return sound, damaged
