"""Which items make up a batch: functions of seed, step and process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from utils.training.distributed import own_slice, rank, world_size
from utils.training.randomness import generator
from utils.training.schedule import Schedule


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The batches of all epochs of a run, one a step, each a list of (epoch, index) pairs.

    An epoch's order depends on seed and epoch alone, and its last partial batch is dropped; so a run may
    begin at any step. As all epochs are one sequence, the workers never run dry between two of them. Of
    several processes each gets its slice of the batch.

    Args:
        size: number of items.
        batch_size: B.
        schedule: of the run.
        seed: of the run.
        done: steps that are left out at the start.
    """

    def __init__(self, size: int, batch_size: int, schedule: Schedule, *, seed: int, done: int = 0) -> None:
        self.size, self.batch_size, self.schedule, self.seed, self.done = (
            size,
            batch_size,
            schedule,
            seed,
            done,
        )

    def order(self, epoch: int) -> list[int]:
        """Indices of all items in the order of an epoch."""
        return torch.randperm(self.size, generator=generator(self.seed, "order", epoch)).tolist()

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The batch of a step, from 1."""
        epoch = self.schedule.epoch(step)
        return self._batch(step, self.order(epoch))

    def _batch(self, step: int, order: list[int]) -> list[tuple[int, int]]:
        epoch = self.schedule.epoch(step)
        first = (step - 1 - epoch * self.schedule.per_epoch) * self.batch_size
        return [(epoch, index) for index in order[first : first + self.batch_size]]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.done + 1, self.schedule.total + 1):
            if step == self.done + 1 or self.schedule.ends_epoch(step - 1):
                order = self.order(self.schedule.epoch(step))
            yield own_slice(self._batch(step, order))

    def __len__(self) -> int:
        return self.schedule.total - self.done


class SharedBatches(Sampler[list[int]]):
    """The batches of a split in order, dealt out to the processes in turn.

    So each image is in one batch of one process, and a batch is the one that a single process would see.
    Where the batches run out, the first one keeps the other processes in step (`number` >= `total` tells).

    Args:
        size: number of items.
        batch_size: items a batch; the last one has what is left.

    Attributes:
        total: batches of the split.
    """

    def __init__(self, size: int, batch_size: int) -> None:
        self.size, self.batch_size = size, batch_size
        self.total = -(-size // batch_size)

    def number(self, turn: int) -> int:
        """The place in the split of this process's batch of a turn, from 0."""
        return turn * world_size() + rank()

    def __iter__(self) -> Iterator[list[int]]:
        for turn in range(len(self)):
            number = self.number(turn)
            first = number * self.batch_size if number < self.total else 0
            yield list(range(first, min(first + self.batch_size, self.size)))

    def __len__(self) -> int:
        return -(-self.total // world_size())
