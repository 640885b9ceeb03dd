"""Loss and gradient of a batch over chunks of anchors: no tensor is larger than (chunk, N)."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from loss.contrastive import anchor_weights, masked_contrastive
from loss.kernels import compare, matmul, operands
from loss.propagation import Sets, propagate, select_sets

CHUNK_BYTES = 32  # of a GPU's free memory per entry of an (anchors, N) tensor; twice what is used
memory = cache(torch.cuda.mem_get_info)  # a driver call, so only once per device


class ChunkedLoss:
    """Sums over the anchors of a batch and, if `with_grad`, the gradient of the weighted loss in `grad_z`.

    Takes z (N, D'), f_j as `bank` (N, D), float32 both, and a `PPAPLoss`, whose `bank` has rounded f_j.
    """

    def __init__(self, z: Tensor, bank: Tensor, criterion: nn.Module, *, with_grad: bool) -> None:
        free = memory(z.device)[0] // CHUNK_BYTES if z.is_cuda else 2**24
        self.chunk_size = criterion.chunk_size or max(1, 2 ** min(28, free.bit_length() - 1) // len(z))
        self.z, self.bank, self.boundaries = z, bank, criterion.boundaries
        self.tau, self.operand = criterion.tau, criterion.similarity_dtype
        self.bank_operand = operands(bank, criterion.products)
        self.z_operand = z if criterion.products == "float32" else z.half()
        self.grad_z = torch.zeros_like(z) if with_grad else None  # (N, D')

    def sums(self, groups: Tensor) -> Tensor:
        """Adds anchors; (groups, A_max) int64, -1 = unused.

        Returns:
            (8,) float32: weighted sum of L_i, sum of the weights, |P|, |{below Psi_T}|, Phi_T, Psi_T,
            m_1 + ... + m_T and the number of anchors without a positive.
        """
        sums = self.z.new_zeros(8)
        for part in groups.split(max(1, self.chunk_size // groups.shape[1])):  # (g, A_max)
            sums += self._add_groups(part)
        return sums

    def _add_groups(self, groups: Tensor) -> Tensor:
        # All anchors are propagated first, as the weights depend on how many of a group have positives.
        drawn = groups >= 0  # (g, A_max)
        index = groups.flatten().clamp_min(0)  # (A,)
        chunks = index.chunk(-(-len(index) // self.chunk_size))  # of equal size: a small product is slow
        counts, reached = [], []
        for chunk in chunks:
            last = propagate(self.bank[chunk], self.bank_operand, self.boundaries, operand=self.operand)
            sets = select_sets(last, chunk)
            size = sets.positives.sum(dim=1, dtype=torch.int32)  # (a,)
            counts.append(torch.stack([size, sets.below, size == 0], dim=1))  # (a, 3)
            reached.append(replace(last, similarity=None))
        counts = torch.cat(counts)  # (A, 3) int32
        weights, total = anchor_weights(counts[:, 0] > 0, drawn)
        loss = self.z.new_zeros(())
        for chunk, last, weight in zip(chunks, reached, weights.split(len(chunks[0])), strict=True):
            if len(chunks) > 1:  # the sets of all chunks do not fit into memory
                similarity = compare(last.proxies, self.bank_operand, self.operand)  # (a, N)
                sets = select_sets(replace(last, similarity=similarity), chunk)
            loss += self._add_chunk(chunk, sets, weight)
        used = drawn.view(-1, 1)  # (A, 1)
        size, below, alone = (counts * used).sum(dim=0).to(loss.dtype)
        boundaries = torch.cat([torch.cat([last.phi, last.psi, last.moved], dim=1) for last in reached])
        phi, psi, moved = (boundaries * used).sum(dim=0)  # no float64: MPS has none
        return torch.stack([loss, total.to(loss.dtype), size, below, phi, psi, moved, alone])

    def _add_chunk(self, index: Tensor, sets: Sets, weight: Tensor) -> Tensor:
        """Weighted sum of L_i over the anchors at `index` (a,); adds its gradient to `grad_z`."""
        z, tau = self.z_operand, self.tau
        logits = matmul((self.z[index] / tau).to(z.dtype), z.T)  # (a, N)
        grad = None if self.grad_z is None else (weight / tau)[:, None]  # (a, 1)
        loss, slope = masked_contrastive(logits, sets.positives, sets.negatives, tau, grad, z.dtype)
        if slope is not None:  # (a, N)
            matmul(slope.T, z[index], out=self.grad_z, beta=1)
            self.grad_z.index_add_(0, index, matmul(slope, z))
        return (loss * weight).sum()
