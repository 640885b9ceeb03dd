"""The loss by Triton kernels: what `streamed` holds a chunk at a time, made and consumed tile by tile.

Of the (A, N) pairs only the sets reach memory, a bit a pair, beside at most 32 partial sums (A, D). They are
decided once, so the sum of positives, the loss and both gradients speak of the same sets whatever order their
products are added in. A step makes 2 T + 6 products of A * N * D, where 2 T + 4 would do if the logits were
kept: each of both gradients makes them again, once per 384 columns of z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loss.contrastive import BASE_TEMPERATURE, BatchSums, anchor_weights
from loss.launch import Bank, Sets, contrast, gather, gradient, split_bank, threshold
from loss.propagation import Boundaries, relocate, start


def fused_sums(
    z: Tensor,
    bank: Tensor,
    groups: Tensor,
    *,
    boundaries: Boundaries,
    tau: float,
    operand: torch.dtype = torch.float32,
    with_grad: bool = False,
    precision: str = "ieee",
) -> BatchSums:
    """Propagates every anchor and sums the loss over them.

    Args:
        z: projections, (N, D') float32.
        bank: f_j, (N, D) float32, rounded to `operand`.
        groups: anchors, (groups, A_max) int64, -1 = unused.
        boundaries: the propagation's coefficients.
        tau: the temperature.
        operand: of the similarities, float32 or float16.
        with_grad: whether to fill `grad_z`.
        precision: of float32 products: "ieee", or Triton's "tf32x3" (three TF32 products in place of one).
    """
    z, index = z.contiguous(), groups.flatten().clamp_min(0)  # (A,)
    drawn = groups >= 0  # (g, A_max)
    sets = propagated(bank[index], split_bank(bank, operand), boundaries, precision=precision)
    found = contrast(z, index, sets, tau=tau, precision=precision)
    weights = anchor_weights(found.count > 0, drawn)
    factor = weights.each * (tau / BASE_TEMPERATURE)  # (A,), 0 for an anchor without positives
    size = found.count.clamp_min(1)  # (A,)
    empty = found.log_total == -torch.inf
    log_total = found.log_total.masked_fill(empty, 0)  # (A,), nothing is kept there, so nothing is read
    loss = (factor * (log_total - found.positive / size)).sum()
    counts = (torch.stack([found.count, found.below]) * drawn.flatten()).sum(dim=1)  # (2,)
    grad_z = None
    if with_grad:
        grad_z = gradient(
            z,
            index,
            sets,
            log_total=log_total,
            factor=factor,
            share=factor / size,
            tau=tau,
            precision=precision,
        )
    return BatchSums(torch.stack([loss, weights.total.to(z.dtype), *counts]), grad_z)


def propagated(anchors: Tensor, bank: Bank, boundaries: Boundaries, *, precision: str) -> Sets:
    """P_T and {below Psi_T} of the anchors' features (A, D), by the updates of `loss.propagation`."""
    proxies = start(anchors, boundaries)
    for _ in range(boundaries.steps):
        inside = threshold(proxies.vectors, bank, phi=proxies.phi, precision=precision).above
        positives = gather(inside, bank)
        proxies = relocate(proxies, positives.total, size=positives.size, boundaries=boundaries)
    return threshold(proxies.vectors, bank, phi=proxies.phi, psi=proxies.psi, precision=precision)
