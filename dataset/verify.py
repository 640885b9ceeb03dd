"""Reads every file before a run (--check), to report damaged items or skip them (dataset.skip_damaged)."""

from __future__ import annotations

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.base import Source, Subset, classes_of
from utils.errors import UserError, listed

CHUNK = 16  # items per worker and batch

_results: dict[str, list[str]] = {}  # by digest: the runs of a sweep check the same files once


class _Messages(Dataset):
    """The error message of each item, "" if it is sound."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> str:
        try:
            raw = self.source.read(index)
            if raw.label is not None:
                classes_of(raw.label, self.source, index)
        except UserError as error:
            return str(error)
        return ""


def check_splits(
    sources: dict[str, Source], *, skip: bool, workers: int
) -> tuple[dict[str, Source], list[str]]:
    """Reads every image and label of some splits, with a progress bar.

    Args:
        sources: split -> its items.
        skip: leave damaged items out instead of raising an error.
        workers: number of reading processes.

    Returns:
        The splits without damaged items, and one error message per damaged item.

    Raises:
        UserError: items are damaged and `skip` is false, or a split has no sound item.
    """
    messages = {split: _check(source, split, workers) for split, source in sources.items()}
    damaged = [line for lines in messages.values() for line in lines if line]
    if not damaged:
        return sources, []
    count = f"{len(damaged)} of {sum(map(len, messages.values()))} items are damaged"
    if not skip:
        hint = "fix or remove them, or skip them with dataset.skip_damaged=true"
        raise UserError(listed(f"{count}; {hint}", damaged))
    for split, lines in messages.items():
        if lines and all(lines):
            raise UserError(listed(f"all {len(lines)} {split} items are damaged", lines))
    print(listed(f"{count} and skipped (dataset.skip_damaged)", damaged))
    return {split: _sound(source, messages[split]) for split, source in sources.items()}, damaged


def _sound(source: Source, messages: list[str]) -> Source:
    return Subset(source, [i for i, line in enumerate(messages) if not line]) if any(messages) else source


def _check(source: Source, split: str, workers: int) -> list[str]:
    key = source.digest()
    if key not in _results:
        loader = DataLoader(_Messages(source), CHUNK, num_workers=workers, collate_fn=list)
        with tqdm(total=len(source), desc=f"checking {split} files", unit="item") as bar:
            messages = []
            for lines in loader:
                messages += lines
                bar.update(len(lines))
        _results[key] = messages
    return _results[key]
