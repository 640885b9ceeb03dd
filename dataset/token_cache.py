"""Caches the frozen backbone's tokens of every item, in memory or in memory-mapped files.

Later runs with the same files, geometry, label rule, weights and precision reuse the files.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.base import Batch, SegmentationDataset
from utils.config.options import Options
from utils.errors import UserError
from utils.files import TOKENS_FOLDER, exclusive, make_folder

FORMAT = 3  # raised when tokens or labels change for the same inputs
Encoder = Callable[[Tensor], Tensor]  # images (B, 3, H, W) uint8 on the CPU -> tokens (B, T, D)


@dataclass(eq=False)
class TokenDataset(SegmentationDataset):
    """The items of a data set as cached tokens."""

    arrays: Sequence[
        np.ndarray | Path
    ] = ()  # tokens (n, T, D) float16, labels (n, H, W) uint8; or .npy files

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        index = key[1] if isinstance(key, tuple) else key
        # files are mapped anew for each item: this is cheap, and workers are not sent their content
        opened = (np.load(a, mmap_mode="r") if isinstance(a, Path) else a for a in self.arrays)
        tokens, label = (torch.from_numpy(np.array(array[index])) for array in opened)
        return Batch(tokens, label.long(), torch.tensor(index))


def cache_tokens(
    items: SegmentationDataset, encode: Encoder, options: Options, *, split: str, shape: tuple, model: str
) -> TokenDataset:
    """Encodes all items, or finds files of an earlier run; `shape` is (T, D), `model` names the weights."""
    shapes = (len(items), *shape), (len(items), items.geometry.res, items.geometry.res)
    size = int(2 * np.prod(shapes[0]) + np.prod(shapes[1]))  # bytes
    gib = f"{size / 2**30:.2f} GiB"

    def fill(tokens: np.ndarray, labels: np.ndarray) -> None:
        loading = options.dataloader
        loader = DataLoader(items, loading.val_batch_size, num_workers=loading.num_workers)
        for batch in tqdm(loader, desc=f"{split} tokens", unit="batch"):
            index = batch.index.numpy()
            tokens[index] = encode(batch.image).half().cpu().numpy()
            labels[index] = batch.label.numpy()

    if options.dataset.cache_features == "ram":
        print(f"{split} tokens: {gib} in memory")
        arrays = np.empty(shapes[0], np.float16), np.empty(shapes[1], np.uint8)
        fill(*arrays)
        return TokenDataset(**vars(items), arrays=arrays)
    about = FORMAT, items.source.digest(), list(items.kept), items.crops, items.geometry, model, shapes
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    folder = make_folder(Path(options.output_dir) / TOKENS_FOLDER)
    path = folder / f"{split}-{key}"
    part = path.with_suffix(".part")  # renamed when complete
    with exclusive(path):  # another run or process may be writing the same cache
        if path.is_dir():
            print(f"{split} tokens: read from {path}")
        elif (free := shutil.disk_usage(folder).free) < size:
            raise UserError(
                f"dataset.cache_features is disk: {folder} needs {gib}, but only {free / 2**30:.2f} GiB are "
                "free; free some space, set output_dir to another disk, or set dataset.cache_features=null"
            )
        else:
            print(f"{split} tokens: {gib}, written to {path}")
            part.mkdir(exist_ok=True)
            try:
                tokens = open_memmap(part / "tokens.npy", "w+", np.float16, shapes[0])
                labels = open_memmap(part / "labels.npy", "w+", np.uint8, shapes[1])
                fill(tokens, labels)
                tokens.flush()
                labels.flush()
                part.rename(path)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return TokenDataset(**vars(items), arrays=(path / "tokens.npy", path / "labels.npy"))
