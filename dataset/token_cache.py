"""Caches the frozen backbone's tokens of every item, in memory or in memory-mapped files.

Nothing random happens to an image before the head, so its tokens are the same in every epoch. Later runs with
the same files, geometry, label rule, weights and precision reuse the files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.base import Batch, SegmentationDataset
from utils.config.options import Options
from utils.errors import UserError
from utils.files import TOKENS_FOLDER, make_folder, write_json

FORMAT = 2  # raised when tokens, labels or synthetic scenes change for the same inputs
DTYPES = {"tokens": np.float16, "labels": np.uint8}
Encoder = Callable[[Tensor], Tensor]  # images (B, 3, H, W) uint8 -> tokens (B, T, D)


class TokenDataset(Dataset):
    """Items of a `SegmentationDataset` as cached tokens.

    Args:
        items: the data set that was cached.
        arrays: `tokens` (n, T, D) float16 and `labels` (n, H, W) uint8, or their files, which each worker
            process opens itself.
    """

    def __init__(self, items: SegmentationDataset, arrays: dict[str, np.ndarray | Path]) -> None:
        self.source, self.geometry = items.source, items.geometry
        self._arrays = arrays
        self._opened: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        _, index = key if isinstance(key, tuple) else (0, key)
        if self._opened is None:
            self._opened = {
                name: np.load(array, mmap_mode="r") if isinstance(array, Path) else array
                for name, array in self._arrays.items()
            }
        tokens, label = (torch.from_numpy(np.array(self._opened[name][index])) for name in DTYPES)
        return Batch(tokens, label.long(), torch.tensor(index))

    def __getstate__(self) -> dict:
        """Leaves out the opened files: pickling a memory map would copy its content."""
        return self.__dict__ | {"_opened": None}


def cache_tokens(
    items: SegmentationDataset,
    encode: Encoder,
    options: Options,
    *,
    split: str,
    shape: tuple[int, int],
    model: dict[str, str],
) -> TokenDataset:
    """Encodes all items, or finds the files of an earlier run.

    Args:
        items: the items to encode.
        encode: images (B, 3, H, W) uint8 on the CPU -> tokens (B, T, D).
        options: all options; `dataset.cache_features` chooses memory or files below `<output_dir>/tokens`.
        split: for file names and messages.
        shape: (T, D).
        model: what the tokens depend on besides the items: weights and precision.

    Raises:
        UserError: too little disk space.
    """
    side, loading = items.geometry.res, options.dataloader
    shapes = {"tokens": (len(items), *shape), "labels": (len(items), side, side)}
    size = sum(math.prod(shapes[name]) * np.dtype(dtype).itemsize for name, dtype in DTYPES.items())
    loader = DataLoader(items, loading.val_batch_size, num_workers=loading.num_workers)
    if options.dataset.cache_features == "ram":
        print(f"{split} tokens: {size / 2**30:.2f} GiB in memory")
        arrays = {name: np.empty(shapes[name], dtype) for name, dtype in DTYPES.items()}
        _fill(arrays, loader, encode, split)
        return TokenDataset(items, arrays)
    about = {"format": FORMAT, "data": items.source.digest(), "geometry": repr(items.geometry)}
    about |= model | {name: list(shape) for name, shape in shapes.items()}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder = make_folder(Path(options.output_dir) / TOKENS_FOLDER)
    path = folder / f"{split}-{key}"
    _remove_leftovers(folder)
    with _lock(path):  # another run or process may be writing the same cache
        if path.is_dir():
            print(f"{split} tokens: read from {path}")
        else:
            _check_space(folder, size)
            print(f"{split} tokens: {size / 2**30:.2f} GiB, written to {path}")
            _write(path, about, fill=functools.partial(_fill, loader=loader, encode=encode, split=split))
    return TokenDataset(items, {name: path / f"{name}.npy" for name in shapes})


def _remove_leftovers(folder: Path) -> None:
    """Removes unfinished caches that no process is writing: their runs were killed."""
    for part in folder.glob("*.part"):
        with suppress(Timeout), _lock(part.with_suffix(""), timeout=0):
            shutil.rmtree(part, ignore_errors=True)
            print(f"removed {part}: left unfinished by a killed run")


def _lock(path: Path, timeout: float = -1) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=timeout)


def _check_space(folder: Path, size: int) -> None:
    if (free := shutil.disk_usage(folder).free) < size:
        raise UserError(
            f"dataset.cache_features is disk: {folder} needs {size / 2**30:.2f} GiB, but only "
            f"{free / 2**30:.2f} GiB are free; free some space, set output_dir to another disk, or set "
            "dataset.cache_features=null"
        )


def _write(path: Path, about: dict[str, Any], *, fill: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Fills a temporary folder and renames it, so that a cache that exists is complete."""
    part = path.with_suffix(".part")
    try:
        part.mkdir()
        arrays = {
            name: open_memmap(part / f"{name}.npy", "w+", dtype, tuple(about[name]))
            for name, dtype in DTYPES.items()
        }
        fill(arrays)
        for array in arrays.values():
            array.flush()
        write_json(part / "about.json", about)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fill(arrays: dict[str, np.ndarray], loader: DataLoader, encode: Encoder, split: str) -> None:
    with tqdm(total=len(loader.dataset), desc=f"{split} tokens", unit="image") as bar:
        for batch in loader:
            index = batch.index.numpy()
            arrays["tokens"][index] = encode(batch.image).half().cpu().numpy()
            arrays["labels"][index] = batch.label.numpy()
            bar.update(len(index))
