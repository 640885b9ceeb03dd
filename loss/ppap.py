"""PPAPLoss: anchors are drawn, propagated, and contrasted with the sets they arrive at.

| symbol | code name         | training_coeff.*  | COCO S/8 | COCO S/16 | City B/8 | City S/8 | Potsdam |
| ------ | ----------------- | ----------------- | -------- | --------- | -------- | -------- | ------- |
| Phi_0  | `phi`             | `initialcrit_pos` | 0.55     | 0.55      | 0.6      | 0.6      | 0.55    |
| Psi_0  | `psi`             | `initialcrit_amb` | 0.2      | 0.15      | 0.2      | 0.2      | 0.15    |
| T      | `steps`           | `prop_iter`       | 2        | 2         | 3        | 3        | 1       |
| sigma+ | `sigma_pos`       | `sigma_pos`       | 3        | 3         | 3        | 3        | 5       |
| sigma~ | `sigma_amb`       | `sigma_amb`       | 3        | 4         | 2        | 3        | 3       |
| tau    | `tau`             | `tau`             | 0.8      | 0.8       | 0.1      | 0.8      | 0.07    |
| -      | `trainpatchsplit` | `trainpatchsplit` | 16       | 4         | 16       | 16       | 16      |
| -      | `group_size`      | `group_size`      | 784      | 784       | 784      | 784      | 784     |

Where the published code differs: it holds the initial boundaries of t >= 1 in float16, makes the loss NaN
where a group has no positive at all, divides by zero below 784 patches, never draws an anchor beyond the
last full group, and builds an (A, N, D) tensor a step. Here a short group counts by its anchors, a group
without positives is left out, and only matrix products over a chunk of anchors are held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from loss.chunked import chunked_sums
from loss.contrastive import BatchSums
from loss.propagation import Boundaries
from utils.training.distributed import all_gather, all_reduce, own_groups, world_size

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**25}  # entries of one (anchors, N) float32 tensor


@dataclass(frozen=True)
class PPAPLossOutput:
    """The loss of a batch and what it was computed over.

    Attributes:
        loss: () float32, with a gradient through z; 0 where no anchor has a positive.
        num_positives: () float32, mean |P| per anchor drawn.
        num_negatives: () float32, mean count of {v_T . f_j < Psi_T} per anchor drawn.
        reached: means over the anchors drawn of Phi_T, Psi_T and m_1 + ... + m_T (how far a proxy has gone
            in all), and the share of anchors without a positive, (4,) float32; None where nobody kept count.
    """

    loss: Tensor
    num_positives: Tensor
    num_negatives: Tensor
    reached: Tensor | None = None

    def statistics(self) -> dict[str, Tensor]:
        """Everything but the loss, () each, under the names that are logged."""
        found = {"num_positives": self.num_positives, "num_negatives": self.num_negatives}
        if self.reached is not None:
            names = ("mean_phi", "mean_psi", "mean_propagation", "without_positives")
            found |= zip(names, self.reached.unbind(), strict=True)
        return found


class PPAPLoss(nn.Module):
    """The contrastive loss of PPAP over the patches of a batch.

    The symbols and the paper's values stand in the table above. All arithmetic is float32 with TF32 off,
    whatever autocast is around it: a bfloat16 product moves a similarity by up to 4e-3 and changes about
    1% of P_0.

    Args:
        initialcrit_pos: Phi_0.
        initialcrit_amb: Psi_0.
        prop_iter: T >= 0.
        sigma_pos: > 0; infinity holds Phi still.
        sigma_amb: > 0; infinity holds Psi still.
        trainpatchsplit: a group of s patches gives max(1, s // trainpatchsplit) anchors.
        tau: temperature > 0.
        group_size: consecutive patches that share a draw of anchors and a mean (784: one image at patch 8
            and 224 pixels).
        similarity_dtype: operands of the products that are compared with a boundary, float32 or float16
            (rounded to it, accumulated in float32).
        chunk_size: anchors held against the N patches at a time; None chooses by device and N. A group
            that does not fit is compared with the patches once more than one that does.

    Raises:
        ValueError: a coefficient is out of range.
    """

    def __init__(
        self,
        *,
        initialcrit_pos: float,
        initialcrit_amb: float,
        prop_iter: int,
        sigma_pos: float,
        sigma_amb: float,
        trainpatchsplit: int,
        tau: float,
        group_size: int = 784,
        similarity_dtype: torch.dtype = torch.float32,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        wrong = [
            f"{name} is {value}, must be {allowed}"
            for name, value, allowed, good in (
                ("prop_iter", prop_iter, "at least 0", prop_iter >= 0),
                ("sigma_pos", sigma_pos, "above 0", sigma_pos > 0),
                ("sigma_amb", sigma_amb, "above 0", sigma_amb > 0),
                ("tau", tau, "above 0 and finite", 0 < tau < float("inf")),
                ("trainpatchsplit", trainpatchsplit, "at least 1", trainpatchsplit >= 1),
                ("group_size", group_size, "at least 1", group_size >= 1),
                ("chunk_size", chunk_size, "None or at least 1", chunk_size is None or chunk_size >= 1),
                (
                    "similarity_dtype",
                    similarity_dtype,
                    "torch.float32 or torch.float16",
                    similarity_dtype in (torch.float32, torch.float16),
                ),
            )
            if not good
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        self.boundaries = Boundaries(initialcrit_pos, initialcrit_amb, prop_iter, sigma_pos, sigma_amb)
        self.trainpatchsplit = trainpatchsplit
        self.tau = tau
        self.group_size = group_size
        self.similarity_dtype = similarity_dtype
        self.chunk_size = chunk_size

    def sample_anchors(self, patches: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws anchors without replacement from each group of consecutive patches.

        Group g's anchors depend on the generator's state and on g alone, not on how many groups follow.

        Args:
            patches: N.
            generator: a CPU generator; None takes torch's global one.

        Returns:
            (groups, A_max) int64 on the CPU, indices into the N patches; -1 fills a short group's row.
        """
        groups = -(-patches // self.group_size)
        widest = max(1, min(self.group_size, patches) // self.trainpatchsplit)
        anchors = torch.full((groups, widest), -1)  # (G, A_max)
        for group in range(groups):
            size = min(self.group_size, patches - group * self.group_size)
            drawn = max(1, size // self.trainpatchsplit)
            order = torch.randperm(size, generator=generator)
            anchors[group, :drawn] = order[:drawn] + group * self.group_size
        return anchors

    def forward(
        self,
        z: Tensor,
        features: Tensor,
        anchors: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PPAPLossOutput:
        """The loss of one batch; the gradient flows through z only.

        Where torch.distributed runs, z and features are this rank's slice of the batch, as many images on
        each rank, while anchors and generator are the same on all. Each rank holds its share of the groups
        against the patches of all ranks: the output is that of the whole batch, and the gradient this
        share's part of it (see `utils.training.distributed`).

        Args:
            z: projections, (N, D') of any float dtype, rows in (image, row, column) order, used as given.
            features: criterion features, (B, D, h, w) of any float dtype with B*h*w = N; normalised here.
            anchors: (groups, A_max) int64 indices into the patches (of all ranks), -1 = unused; sampled if
                None.
            generator: the CPU generator for sampling.

        Raises:
            ValueError: shapes, dtype or indices that do not fit, or a device that the backend has not.
        """
        self._check(z, features, anchors)
        if anchors is None:
            anchors = self.sample_anchors(world_size() * len(z), generator)
        anchors = anchors.to(z.device, non_blocking=True)
        with torch.autocast(z.device.type, enabled=False), ieee_float32():
            z, bank = all_gather(z.float()), all_gather(self.bank(features))  # of all ranks
            return PPAPLossOutput(*_Loss.apply(z, bank, anchors, self))

    def bank(self, features: Tensor) -> Tensor:
        """f_j of every patch, (B, D, h, w) of any float dtype -> (N, D) float32 of unit length.

        Rounded to `similarity_dtype`; rows in (image, row, column) order, without a gradient.
        """
        rows = features.detach().float().permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
        return F.normalize(rows, dim=1).to(self.similarity_dtype).float()

    def rows_per_chunk(self, z: Tensor) -> int:
        """How many anchors are held against the N patches at a time."""
        budget = CHUNK_ELEMENTS.get(z.device.type, CHUNK_ELEMENTS["cpu"])
        return self.chunk_size or max(1, budget // len(z))

    def _check(self, z: Tensor, features: Tensor, anchors: Tensor | None) -> None:
        if features.ndim != 4:
            raise ValueError(f"features must be (B, D, h, w), got {tuple(features.shape)}")
        patches = features.shape[0] * features.shape[2] * features.shape[3]
        if z.ndim != 2 or len(z) != patches or patches == 0:
            raise ValueError(
                f"z must be (B*h*w, D) = ({patches}, D) with at least one row for features "
                f"{tuple(features.shape)}, got {tuple(z.shape)}"
            )
        if anchors is None:
            return
        if anchors.ndim != 2 or anchors.dtype != torch.int64 or anchors.numel() == 0:
            got = f"{tuple(anchors.shape)} {anchors.dtype}"
            raise ValueError(f"anchors must be (groups, A_max) int64 with at least one entry, got {got}")
        if anchors.device.type == "cpu":  # on a GPU this look would wait for it; the gather there checks
            (low, high), everywhere = anchors.aminmax(), world_size() * patches
            if low < -1 or high >= everywhere:
                raise ValueError(f"anchors must lie in [0, {everywhere}) or be -1, got {low} to {high}")

    def extra_repr(self) -> str:
        """The coefficients, for print(model)."""
        drawn = f"trainpatchsplit={self.trainpatchsplit}, group_size={self.group_size}"
        return f"{self.boundaries}, tau={self.tau}, {drawn}"


class _Loss(torch.autograd.Function):
    """Loss and gradient in one pass; keeps grad_z and nothing of size A x N."""

    @staticmethod
    def forward(ctx, z: Tensor, bank: Tensor, anchors: Tensor, criterion: PPAPLoss):
        found = _add_up(z, bank, own_groups(anchors), criterion=criterion, with_grad=ctx.needs_input_grad[0])
        loss, weight, positives, negatives = all_reduce(found.sums).unbind()
        weight = weight.clamp_min(1)  # no positive anywhere: 0 / 1
        ctx.grad_z = None if found.grad_z is None else found.grad_z.div_(weight)
        drawn = (anchors >= 0).sum().clamp_min(1)
        reached = None if found.reached is None else all_reduce(found.reached) / drawn
        counts = (positives / drawn, negatives / drawn, reached)
        ctx.mark_non_differentiable(*(count for count in counts if count is not None))
        return loss / weight, *counts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_unused):
        return grad_loss * ctx.grad_z, None, None, None


def _add_up(z: Tensor, bank: Tensor, anchors: Tensor, *, criterion: PPAPLoss, with_grad: bool) -> BatchSums:
    """Sums over all anchors and the gradient of the first, by the criterion's backend."""
    settings = {
        "boundaries": criterion.boundaries,
        "tau": criterion.tau,
        "operand": criterion.similarity_dtype,
        "with_grad": with_grad,
    }
    return chunked_sums(z, bank, anchors, rows=criterion.rows_per_chunk(z), **settings)


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Holds float32 matrix products at IEEE precision: TF32 would move patches across a boundary."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
