"""Loss and gradient of a batch in one pass over chunks of anchors: no tensor is larger than (chunk, N)."""

from functools import cache

import torch
from torch import Tensor, nn

from loss.contrastive import masked_contrastive
from loss.kernels import matmul, operands
from loss.propagation import Sets, propagate, select_sets

CHUNK_BYTES = 32  # of a GPU's free memory per entry of an (anchors, N) tensor; twice what is used
memory = cache(torch.cuda.mem_get_info)  # a driver call, so only once per device


class ChunkedLoss:
    """Sums over the anchors of a batch, and in `grad_z` the gradient of the weighted sum of L_i.

    Takes z (N, D'), f_j as `bank` (N, D), both float32, and a `PPAPLoss`, whose `bank` has rounded f_j.
    """

    def __init__(self, z: Tensor, bank: Tensor, criterion: nn.Module) -> None:
        free = memory(z.device)[0] // CHUNK_BYTES if z.is_cuda else 2**24
        self.chunk_size = criterion.chunk_size or 2 ** min(28, free.bit_length() - 1) // len(z)
        self.z, self.bank, self.criterion = z.detach(), bank, criterion
        self.z_operand = self.z if criterion.products == "float32" else self.z.half()
        self.bank_operand = operands(bank, criterion.products)
        self.grad_z = torch.zeros_like(self.z)  # (N, D')

    def sums(self, groups: Tensor) -> Tensor:
        """Adds anchors, (groups, A_max) int64, -1 = unused; a chunk has the anchors of at least one group.

        Returns:
            (8,) float32: weighted sum of L_i, sum of the weights, |P|, |{below Psi_T}|, Phi_T, Psi_T,
            m_1 + ... + m_T and the number of anchors without a positive.
        """
        chunks = groups.split(max(1, self.chunk_size // groups.shape[1]))  # (g, A_max) each
        return sum(self._add_chunk(chunk) for chunk in chunks)

    def _add_chunk(self, groups: Tensor) -> Tensor:
        drawn, index = groups >= 0, groups.flatten().clamp_min(0)  # (g, A_max), (A,)
        reached = propagate(self.bank[index], self.bank_operand, self.criterion.boundaries)
        sets = select_sets(reached, index)
        boundaries = torch.cat([reached.phi, reached.psi, reached.moved], dim=1)  # (A, 3)
        del reached  # its similarities are as large as the logits
        size = sets.positives.sum(dim=1, dtype=torch.int32)  # (A,)
        # a group's loss is the mean over its anchors with a positive; groups are weighted by their anchors
        valid = (size > 0).view_as(drawn) & drawn  # (g, A_max)
        valid_count = valid.sum(dim=1, keepdim=True)  # (g, 1)
        group_weight = drawn.sum(dim=1, keepdim=True) * (valid_count > 0)  # (g, 1)
        weight = (valid * group_weight / valid_count.clamp_min(1)).flatten()  # (A,)
        loss = self._add_gradient(index, sets, weight)
        used = drawn.view(-1, 1)  # (A, 1)
        counts = torch.stack([size, sets.below, size == 0], dim=1)  # (A, 3) int32
        positives, below, alone = (counts * used).sum(dim=0).float()
        phi, psi, moved = (boundaries * used).sum(dim=0)  # no float64: MPS has none
        return torch.stack([loss, group_weight.sum().float(), positives, below, phi, psi, moved, alone])

    def _add_gradient(self, index: Tensor, sets: Sets, weight: Tensor) -> Tensor:
        """Weighted sum of L_i over the anchors at `index` (A,); adds its gradient to `grad_z`."""
        z, tau = self.z_operand, self.criterion.tau
        logits = matmul((self.z[index] / tau).to(z.dtype), z.T)  # (A, N)
        grad = (weight / tau)[:, None]  # (A, 1)
        loss, slope = masked_contrastive(logits, sets.positives, sets.negatives, tau, grad, z.dtype)
        matmul(slope.T, z[index], out=self.grad_z, beta=1)  # slope: (A, N)
        self.grad_z.index_add_(0, index, matmul(slope, z))
        return (loss * weight).sum()
