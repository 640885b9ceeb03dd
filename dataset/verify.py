"""Reads every file before a run (--check), to report damaged items or skip them (dataset.skip_damaged)."""

from functools import partial

from torch.utils.data import DataLoader

from dataset.base import Source, classes_of
from utils.errors import UserError, listed
from utils.progress import Bar
from utils.training.stopping import worker_settings

_checked: dict[str, list[str]] = {}  # by digest: the runs of a sweep read the same files once


def _message(source: Source, indices: list[int]) -> str:
    """The error message of an item, "" if it is sound; runs in the workers of a loader of indices."""
    (index,) = indices
    try:
        _, label = source.read(index)
        if label is not None:
            classes_of(label, source, index)
    except UserError as error:
        return str(error)
    return ""


def sound_items(
    sources: dict[str, Source], *, skip: bool, workers: int
) -> tuple[dict[str, list[int]], list[str]]:
    """Reads every image and label; returns the sound items of each split and a message per damaged one."""
    messages = {}
    for split, source in sources.items():
        if (key := source.digest()) not in _checked:
            how = {"collate_fn": partial(_message, source), **worker_settings(workers)}
            loader = DataLoader(range(len(source)), **how)
            _checked[key] = list(Bar(loader, desc=f"checking {split} files", unit="item"))
        messages[split] = _checked[key]
    damaged = [line for lines in messages.values() for line in lines if line]
    if damaged:
        count = f"{len(damaged)} of {sum(map(len, messages.values()))} images or labels are damaged"
        if not skip:
            hint = "fix or remove them, or skip them with dataset.skip_damaged=true"
            raise UserError(listed(f"{count}; {hint}", damaged))
        print(listed(f"{count} and skipped (dataset.skip_damaged)", damaged))
    sound = {split: [i for i, line in enumerate(lines) if not line] for split, lines in messages.items()}
    return sound, damaged
