"""Caches the frozen backbone's tokens of every item, in memory or in memory-mapped files.

Later runs with the same files, geometry, label rule, weights and precision reuse the files.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader, default_convert

from dataset.base import Batch, SegmentationDataset
from dataset.samplers import loader_workers, validation_batch_size
from utils.config.options import Options
from utils.errors import UserError
from utils.files import TOKENS_FOLDER, exclusive, make_folder
from utils.progress import Bar
from utils.training.device import upload
from utils.training.stopping import worker_settings

FORMAT = 4  # raised when tokens or labels change for the same inputs
NAMES = ("tokens.npy", "labels.npy")
KEPT_FREE = 16 * 2**30  # bytes of a GPU that are left to training
Encoder = Callable[[Tensor], Tensor]  # images (B, 3, H, W) uint8 on the CPU -> tokens (B, T, D)


@dataclass(eq=False)
class TokenDataset(SegmentationDataset):
    """The items of a data set as cached tokens; a loader reads whole batches."""

    stored: Sequence[Tensor | Path] = ()  # tokens (n, T, D) float16, labels (n, H, W) uint8; or .npy files

    @property
    def place(self) -> str:
        """Where the tokens are: "disk", "cpu" or "cuda"."""
        return "disk" if isinstance(self.stored[0], Path) else self.stored[0].device.type

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        return Batch(*(values[0] for values in self.__getitems__([key])))

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> Batch:
        index = torch.tensor([key[1] if isinstance(key, tuple) else key for key in keys])  # (B,)
        if self.place == "disk":  # mapped anew each time: this is cheap, and workers are not sent the content
            maps = (np.load(path, mmap_mode="r") for path in self.stored)
            return Batch(*(torch.from_numpy(values[index.numpy()]) for values in maps), index)
        here = upload(index, self.stored[0].device)
        return Batch(*(values[here] for values in self.stored), here)


class TokenLoader(DataLoader):
    """Loads batches of a `TokenDataset`: from memory in a thread, one batch ahead."""

    def __init__(self, items: TokenDataset, *, pin_memory: bool, **arguments: Any) -> None:
        arguments["pin_memory"] = pin_memory and items.place != "cuda"
        super().__init__(items, collate_fn=default_convert, **arguments)  # which leaves a batch as it is

    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        if self.dataset.place != "cpu":
            yield from batches
            return
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(next, batches, None)
            while (batch := ahead.result()) is not None:
                ahead = pool.submit(next, batches, None)
                yield batch


@contextmanager
def cache_entry(items: SegmentationDataset, options: Options, name: str, *about: Any) -> Iterator[Path]:
    """The path below `output_dir` of data computed from items; `about` lists its other dependencies.

    It is locked, as another run or process may be writing the same.
    """
    about = items.source.digest(), list(items.kept), items.crops, items.geometry, items.hides_labels, *about
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    path = make_folder(Path(options.output_dir) / TOKENS_FOLDER) / f"{name}-{key}"
    with exclusive(path):
        yield path


def cache_tokens(
    items: SegmentationDataset,
    encode: Encoder,
    options: Options,
    *,
    split: str,
    model: str,
    token_shape: Callable[[int], tuple[int, int]],
    device: torch.device,
) -> TokenDataset:
    """Encodes all items of a split, or finds the files of an earlier run.

    `model` names the weights, `token_shape` returns (T, D) at a resolution, and a GPU `device` holds the
    tokens of "ram" if it has room.
    """
    res = items.geometry.res
    shapes = (len(items), *token_shape(res)), (len(items), res, res)
    size = int(2 * np.prod(shapes[0]) + np.prod(shapes[1]))  # bytes
    fill = partial(_fill, items, encode, options, split)
    if options.dataset.cache_features == "ram":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        place = device if free > size + KEPT_FREE else torch.device("cpu")
        print(f"{split} tokens: {size / 2**30:.2f} GiB in memory ({place})")
        kinds = zip(shapes, (torch.float16, torch.uint8), strict=True)
        stored = [torch.empty(each, dtype=dtype, device=place) for each, dtype in kinds]
        fill(*stored)
        return TokenDataset(**vars(items), stored=stored)
    with cache_entry(items, options, split, FORMAT, model, shapes) as path:
        print(f"{split} tokens: {size / 2**30:.2f} GiB in {path}")
        if not path.is_dir():
            if (free := shutil.disk_usage(path.parent).free) < size:
                raise UserError(
                    f"dataset.cache_features is disk: only {free / 2**30:.2f} GiB are free in {path.parent}; "
                    "free some space, choose another output_dir, or set dataset.cache_features=null"
                )
            _write(path, shapes, fill)
    return TokenDataset(**vars(items), stored=[path / name for name in NAMES])


def _fill(
    items: SegmentationDataset, encode: Encoder, options: Options, split: str, tokens: Tensor, labels: Tensor
) -> None:
    loader = DataLoader(items, validation_batch_size(options), **worker_settings(loader_workers(options)))
    for batch in Bar(loader, desc=f"{split} tokens", unit="batch"):
        tokens[batch.index] = encode(batch.image).half().to(tokens.device)
        labels[batch.index] = batch.label.to(labels.device)


def _write(path: Path, shapes: Sequence[tuple[int, ...]], fill: Callable[[Tensor, Tensor], None]) -> None:
    """Fills the files of a temporary folder, which becomes `path` if that succeeds."""
    part = path.with_suffix(".part")
    part.mkdir(exist_ok=True)
    try:
        kinds = zip(NAMES, (np.float16, np.uint8), shapes, strict=True)
        arrays = [open_memmap(part / name, "w+", dtype, shape) for name, dtype, shape in kinds]
        fill(*map(torch.from_numpy, arrays))
        for array in arrays:
            array.flush()
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
