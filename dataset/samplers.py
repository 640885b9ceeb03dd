"""Batch samplers: which items make up a batch, as a function of seed, step and rank."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from utils.config.options import Options
from utils.training.distributed import own_slice, rank, world_size
from utils.training.launch import own_cores
from utils.training.randomness import generator


def validation_batch_size(options: Options) -> int:
    """`dataloader.val_batch_size`, by default a number that suits the device."""
    suitable = 32 if torch.cuda.is_available() else 8  # on a GPU, small batches are bound by the host
    return options.dataloader.val_batch_size or suitable


def loader_workers(options: Options) -> int:
    """`dataloader.num_workers`, but no more than this process's share of the cores."""
    return min(options.dataloader.num_workers, own_cores(options.trainer.devices))


@dataclass(eq=False)
class TrainBatchSampler(Sampler[list[tuple[int, int]]]):
    """This rank's slices of shuffled batches of (epoch, index) pairs; the last partial batch is dropped.

    The order of an epoch depends on seed and epoch alone. With `neighbours`, a slice is followed by a random
    neighbour of each of its items.
    """

    size: int
    batch_size: int
    seed: int
    first_step: int = 0  # steps already trained, which the first iteration skips
    neighbours: torch.Tensor | None = None  # (size, k) indices of similar items

    def __post_init__(self) -> None:
        self.epoch = self.first_step // len(self)
        self.sampler = self  # Lightning calls `batch_sampler.sampler.set_epoch` before each epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, from 0, of the next iteration."""
        self.epoch = epoch

    def batches(self, epoch: int) -> list[list[int]]:
        """Indices of the global batches of an epoch."""
        order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch))
        return [batch.tolist() for batch in order.split(self.batch_size)][: len(self)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        trained = max(0, self.first_step - epoch * len(self))  # steps of this epoch
        for number, batch in enumerate(self.batches(epoch)[trained:], start=trained):
            indices = [*own_slice(batch), *own_slice(self._neighbours_of(batch, epoch, number))]
            yield [(epoch, index) for index in indices]

    def _neighbours_of(self, batch: list[int], epoch: int, number: int) -> list[int]:
        """A random neighbour of each item of a global batch, if there are any."""
        if self.neighbours is None:
            return []
        drawn = generator(self.seed, "neighbour", epoch, number)
        chosen = torch.randint(self.neighbours.shape[1], (len(batch), 1), generator=drawn)
        return self.neighbours[batch].gather(1, chosen)[:, 0].tolist()

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.size // self.batch_size


class EvaluationBatchSampler(Sampler[list[int]]):
    """The batches of a split in order, distributed round-robin over the ranks.

    Each batch is the one that a single process would see. When the `total` batches run out, the other ranks
    get the first one again to stay in step; `number(turn) >= total` marks it as one to skip.
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
