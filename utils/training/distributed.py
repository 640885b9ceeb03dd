"""Collectives for training on several processes (ranks).

Each rank holds an equal, contiguous slice of the global batch. A loss built from these functions has the
value of the global batch on every rank; its gradient on a rank is that rank's part, and the parts of all
ranks add up to the gradient of the global batch. With one process, every function is the identity.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

Rows = TypeVar("Rows", bound=Sequence)


def world_size() -> int:
    """Number of processes; 1 before the process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def own_slice(rows: Rows) -> Rows:
    """This rank's contiguous part of a global batch whose size is a multiple of `world_size()`."""
    each = len(rows) // world_size()
    return rows[rank() * each : (rank() + 1) * each]


def own_groups(groups: Tensor) -> Tensor:
    """This rank's share of G groups of anchors or patches, (G, ...); sizes differ by at most one."""
    return groups.tensor_split(world_size())[rank()]


def all_gather(rows: Tensor) -> Tensor:
    """Concatenates the rows of all ranks, (n, ...) each -> (world_size * n, ...).

    The gradient of a rank's rows is the sum of the gradients that all ranks compute for them.
    """
    return rows if world_size() == 1 else _AllGather.apply(rows)


def all_reduce(values: Tensor) -> Tensor:
    """Sum over the ranks; each rank gets the gradient of its own term."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total + (values - values.detach())


def all_reduce_mean(value: Tensor) -> Tensor:
    """Mean over the ranks, with the gradient of the rank's own term."""
    return all_reduce(value) / world_size()


def all_gather_object(value: Any) -> list[Any]:
    """The value of every rank, in rank order. Must be called by all ranks; tensors must be on the CPU."""
    found = [value] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


class Agreement:
    """Lets the ranks agree on two booleans without blocking a step: any rank's True counts."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._flags, self._work = torch.zeros(2, dtype=torch.int32), None

    def start(self, *flags: bool) -> None:
        """Begins to exchange this rank's booleans, on a CPU process group."""
        self._flags = torch.tensor(flags, dtype=torch.int32)
        if world_size() > 1:
            self._group = self._group or dist.new_group(backend="gloo")
            self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, self._group, async_op=True)

    def result(self) -> list[bool]:
        """Whether each boolean was True on any rank; False before the first exchange."""
        if self._work is not None:
            self._work.wait()
        return self._flags.bool().tolist()


class _AllGather(Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        out = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.14
        gather(out, rows.contiguous())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        own = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(own, grad.contiguous())
        return own
