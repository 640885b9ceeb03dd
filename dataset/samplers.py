"""Batch samplers: which items make up a batch, as a function of seed, step and rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from utils.training.distributed import own_slice, rank, world_size
from utils.training.randomness import generator


class TrainBatchSampler(Sampler[list[tuple[int, int]]]):
    """Shuffled training batches of (epoch, index) pairs, starting at any step.

    The order of an epoch depends on seed and epoch alone; the last partial batch is dropped. Each rank gets
    its slice of a batch.

    Args:
        size: number of items.
        batch_size: items per step, on all ranks together.
        seed: of the run.
        first_step: number of steps already trained; the first iteration skips them.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, first_step: int = 0) -> None:
        self.size, self.batch_size, self.seed, self.first_step = size, batch_size, seed, first_step
        self.epoch = first_step // len(self)
        self.sampler = self  # Lightning calls `batch_sampler.sampler.set_epoch` before each epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, from 0, of the next iteration."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """All indices in the order of an epoch."""
        return torch.randperm(self.size, generator=generator(self.seed, "order", epoch)).tolist()

    def batch(self, step: int) -> list[int]:
        """Indices of the global batch of a step, from 1."""
        epoch, batch_idx = divmod(step - 1, len(self))
        return self.order(epoch)[batch_idx * self.batch_size :][: self.batch_size]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = self.epoch, self.order(self.epoch)
        trained = max(0, self.first_step - epoch * len(self))  # of this epoch
        for batch_idx in range(trained, len(self)):
            batch = order[batch_idx * self.batch_size :][: self.batch_size]
            yield [(epoch, index) for index in own_slice(batch)]

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.size // self.batch_size


class EvaluationBatchSampler(Sampler[list[int]]):
    """The batches of a split in order, dealt out to the ranks in turn.

    Each batch is the one that a single process would see. When the batches run out, the remaining ranks get
    the first batch again to stay in step; `number(turn) >= total` marks it as one to skip.

    Args:
        size: number of items.
        batch_size: items per batch; the last one may be smaller.

    Attributes:
        total: batches of the split.
    """

    def __init__(self, size: int, batch_size: int) -> None:
        self.size, self.batch_size = size, batch_size
        self.total = -(-size // batch_size)

    def number(self, turn: int) -> int:
        """Index in the split of this rank's batch of a turn."""
        return turn * world_size() + rank()

    def __iter__(self) -> Iterator[list[int]]:
        for turn in range(len(self)):
            number = self.number(turn)
            first = number * self.batch_size if number < self.total else 0
            yield list(range(first, min(first + self.batch_size, self.size)))

    def __len__(self) -> int:
        return -(-self.total // world_size())
