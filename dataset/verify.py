"""Reading every file once before a run: what is damaged stops it there, or is left out and listed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.base import Kept, Source, classes_of
from utils.errors import UserError, listed

CHUNK = 16  # items that a worker reads at a time


@dataclass(frozen=True)
class Checked:
    """A split after the check.

    Attributes:
        source: the split, without its damaged items.
        damaged: what is wrong with each item that was left out, in the order of the split.
    """

    source: Source
    damaged: tuple[str, ...] = ()


class _Findings(Dataset):
    """Item -> what is wrong with it, '' where nothing is."""

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


def check_splits(sources: dict[str, Source], *, skip: bool, workers: int) -> dict[str, Checked]:
    """Reads every image and label of some splits, with a progress bar.

    Args:
        sources: split -> its items.
        skip: whether damaged items are left out (`dataset.skip_damaged`) or are an error.
        workers: processes that read.

    Raises:
        UserError: some are damaged and `skip` is false, or all of a split are; names them.
    """
    found = {split: _findings(source, split=split, workers=workers) for split, source in sources.items()}
    lines = [line for findings in found.values() for line in findings if line]
    number = f"{len(lines)} of {sum(map(len, found.values()))} items are damaged"
    if lines and not skip:
        hint = "mend or remove them, or leave them out with dataset.skip_damaged=true"
        raise UserError(listed(f"{number}; {hint}", lines))
    for split, findings in found.items():
        if findings and all(findings):
            raise UserError(listed(f"all {len(findings)} {split} items are damaged", findings))
    if lines:
        print(listed(f"{number} and left out (dataset.skip_damaged)", lines))
    return {split: _without(source, found[split]) for split, source in sources.items()}


def _without(source: Source, findings: tuple[str, ...]) -> Checked:
    kept = [index for index, finding in enumerate(findings) if not finding]
    if len(kept) == len(findings):
        return Checked(source)
    return Checked(Kept(source, kept), tuple(filter(None, findings)))


_remembered: dict[str, tuple[str, ...]] = {}  # the runs of a sweep read the same files


def _findings(source: Source, *, split: str, workers: int) -> tuple[str, ...]:
    """What is wrong with each item, '' where nothing is; the same files are read once a process."""
    digest = hashlib.sha256(repr(source.rule.tolist()).encode())
    for index in range(len(source)):
        digest.update(source.stamp(index).encode())
    key = digest.hexdigest()
    if key not in _remembered:
        loader = DataLoader(_Findings(source), CHUNK, num_workers=workers, collate_fn=list)
        with tqdm(total=len(source), desc=f"checking {split} files", unit="item") as bar:
            found: list[str] = []
            for findings in loader:
                found += findings
                bar.update(len(findings))
        _remembered[key] = tuple(found)
    return _remembered[key]
