"""Tokens instead of images: what the frozen backbone says of an item, computed once and read ever after.

Nothing random touches an image before the head, so the tokens of an item are the same in every epoch. They
are held as float16, in memory or in memory-mapped files that later runs on the same data, geometry and
weights find again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.base import Batch, SegmentationDataset
from utils.errors import UserError, first_line
from utils.files import make_folder, read_json_object, write_json
from utils.unfinished import remove_abandoned, unfinished_folder

HEADROOM = 2**28  # bytes that a cache leaves free
FORMAT = 1  # raised when tokens, labels or synthetic scenes come out otherwise than before
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # a container sees its own here
IGNORED = 255  # as labels are stored; every data set here has fewer classes


class TokenDataset(Dataset):
    """Items of a `SegmentationDataset` as tokens.

    Args:
        items: where labels, names and order come from.
        tokens: (n, T, D) float16, or a file of it, which each worker opens for itself.
        labels: (n, H, W) uint8, 255 = ignore, or a file of it.
    """

    def __init__(
        self, items: SegmentationDataset, tokens: np.ndarray | Path, labels: np.ndarray | Path
    ) -> None:
        self.source, self.geometry = items.source, items.geometry
        self.stored = (tokens, labels)
        self.opened: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        _, index = key if isinstance(key, tuple) else (0, key)
        if self.opened is None:
            self.opened = tuple(np.load(s, mmap_mode="r") if isinstance(s, Path) else s for s in self.stored)
        tokens, labels = (torch.from_numpy(np.array(array[index])) for array in self.opened)
        return Batch(tokens, stored_classes(labels), torch.tensor(index))

    def __getstate__(self) -> dict:
        """Without the open files, which would be sent to a worker as a whole."""
        return self.__dict__ | {"opened": None}


def stored_classes(labels: Tensor) -> Tensor:
    """uint8 with 255 = ignore to int64 with -1 = ignore."""
    classes = labels.long()
    return classes.masked_fill(classes == IGNORED, -1)


def cached(
    items: SegmentationDataset,
    encode: Callable[[Tensor], Tensor],
    *,
    shape: tuple[int, int],
    folder: Path | None,
    about: dict[str, str],
    batch_size: int,
    workers: int,
    split: str,
) -> TokenDataset:
    """The items as tokens; computes what no earlier run has left behind.

    Args:
        items: what to encode.
        encode: images (B, 3, H, W) uint8 on the CPU to tokens (B, T, D).
        shape: (T, D).
        folder: that holds the caches of all runs; None keeps the tokens in memory.
        about: what else the tokens depend on; part of the key.
        batch_size: images at a time.
        workers: processes that decode.
        split: for the progress bar and the log.

    Raises:
        UserError: too little space.
    """
    res = items.geometry.res
    plan = {
        "tokens": Stored((len(items), *shape), np.dtype(np.float16)),
        "labels": Stored((len(items), res, res), np.dtype(np.uint8)),
    }
    needed = sum(stored.bytes for stored in plan.values())
    loader = DataLoader(items, batch_size, num_workers=workers)
    if folder is None:
        _check_space(_free_memory(), needed, f"{split} tokens in memory", "dataset.cache_features=disk")
        arrays = {name: np.empty(stored.shape, stored.dtype) for name, stored in plan.items()}
        _fill(arrays, loader, encode, split)
        return TokenDataset(items, **arrays)
    there = folder / f"{split}-{_key(items, about)}"
    if _complete(there, plan):
        print(f"{split} tokens: read from {there}")
    else:
        make_folder(folder)
        for path in remove_abandoned(folder):
            print(f"removed {path}: its run was killed before the tokens were whole")
        mend = "dataset.cache_features=null, or output_dir to another disk"
        _check_space(shutil.disk_usage(folder).free, needed, f"{split} tokens in {folder}", mend)
        print(f"{split} tokens: {needed / 2**30:.2f} GiB, written to {there}")
        _write(
            there, plan, about=about, fill=functools.partial(_fill, loader=loader, encode=encode, split=split)
        )
    return TokenDataset(items, *(there / f"{name}.npy" for name in plan))


@dataclass(frozen=True)
class Stored:
    """An array as it is to be stored."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def _write(
    there: Path,
    plan: dict[str, Stored],
    *,
    about: dict[str, str],
    fill: Callable[[dict[str, np.ndarray]], None],
) -> None:
    """Makes the folder of a cache whole or not at all: under a name of this run alone, then renamed.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with unfinished_folder(there) as part:
            arrays = {name: _new_file(part / f"{name}.npy", stored) for name, stored in plan.items()}
            fill(arrays)
            for array in arrays.values():
                array.flush()
            shapes = {name: list(stored.shape) for name, stored in plan.items()}
            write_json(part / "about.json", about | shapes)
            part.chmod(0o777 & ~_umask())  # it is its user's alone so far
            if not _complete(there, plan):  # otherwise another run was first
                shutil.rmtree(there, ignore_errors=True)  # a damaged one
                os.replace(part, there)
    except OSError as error:
        raise UserError(
            f"{there}: cannot be made ({first_line(error)}); mend that or set dataset.cache_features=null"
        ) from None


def _umask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _new_file(path: Path, stored: Stored) -> np.memmap:
    """A file of an array with its space claimed: on a full disk a write to a hole would kill the process."""
    array = np.lib.format.open_memmap(path, "w+", stored.dtype, stored.shape)
    if hasattr(os, "posix_fallocate") and stored.bytes:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _fill(
    arrays: dict[str, np.ndarray], loader: DataLoader, encode: Callable[[Tensor], Tensor], split: str
) -> None:
    batch: Batch
    with tqdm(total=len(loader.dataset), desc=f"{split} tokens", unit="image") as bar:
        for batch in loader:
            place = batch.index.numpy()
            arrays["tokens"][place] = encode(batch.inputs).half().cpu().numpy()
            arrays["labels"][place] = (
                batch.label.masked_fill(batch.label < 0, IGNORED).to(torch.uint8).numpy()
            )
            bar.update(len(batch.index))


def _key(items: SegmentationDataset, about: dict[str, str]) -> str:
    """16 hex digits from the items' files, how they are cut, resized and labelled, and `about`."""
    source = items.source
    described = [FORMAT, repr(items.geometry), source.labelled, source.rule.tolist(), about]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for index in range(len(items)):
        digest.update(source.stamp(index).encode())
    return digest.hexdigest()[:16]


def _complete(folder: Path, plan: dict[str, Stored]) -> bool:
    """Whether an earlier run's cache is there and whole; a damaged one is made again."""
    try:
        about = read_json_object(folder / "about.json")
        for name, stored in plan.items():
            found = np.load(folder / f"{name}.npy", mmap_mode="r")
            if Stored(tuple(about[name]), found.dtype) != stored or found.shape != stored.shape:
                return False
    except (UserError, OSError, EOFError, ValueError, TypeError, KeyError):
        return False
    return True


def _free_memory() -> int:
    """Bytes of memory that Linux and the control group leave; elsewhere more than any cache takes."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        free = next(2**10 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**62
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        files = int(stat["inactive_file"]) + int(stat["active_file"])  # given up where memory is wanted
    except (OSError, ValueError, KeyError):  # no such group, or no limit ("max")
        return free
    return min(free, max(0, limit - used + files))


def _check_space(free: int, needed: int, what: str, mend: str) -> None:
    if needed + HEADROOM > free:
        raise UserError(
            f"dataset.cache_features: {what} take {needed / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB "
            f"are free; make room, or set {mend}"
        )
