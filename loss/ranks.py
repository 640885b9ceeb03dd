"""Several processes (ranks) as one: what of a loss is the same on all of them, and what is shared out.

Each rank holds an equal, contiguous slice of the global batch. A loss made with these functions has the value
of the global batch on every rank; its gradient on a rank is that rank's part, and the parts of all ranks add
up to the gradient of the global batch. With one process nothing here does anything.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F


def ranks() -> int:
    """How many processes work on a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks in their order, (n, ...) each -> (ranks * n, ...).

    The gradient of a rank's rows is the sum of what all ranks ask of them.
    """
    return rows if ranks() == 1 else _Gather.apply(rows)


def summed(values: Tensor) -> Tensor:
    """Sum over the ranks; its gradient on a rank is that of the rank's own term."""
    return values if ranks() == 1 else _Sum.apply(values)


def averaged(value: Tensor) -> Tensor:
    """Mean over the ranks, likewise: the mean of the global batch where each rank's is over as many."""
    return summed(value) / ranks()


def share(groups: Tensor) -> Tensor:
    """This rank's rows of (G, A_max) indices: as many for each rank, of -1 where they run out."""
    if ranks() == 1:
        return groups
    each = -(-len(groups) // ranks())
    filled = F.pad(groups, (0, 0, 0, each * ranks() - len(groups)), value=-1)  # (ranks * each, A_max)
    return filled.split(each)[dist.get_rank()]


class _Gather(Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        found = rows.new_empty(ranks() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(found, rows.contiguous())
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        own = grad.new_empty(len(grad) // ranks(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


class _Sum(Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad
