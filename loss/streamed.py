"""The loss by matrix products over chunks of anchors: nothing larger than a chunk x N is held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loss.contrastive import BatchSums, anchor_weights, masked_contrastive
from loss.propagation import Boundaries, Sets, propagate, select_sets


def streamed_sums(
    z: Tensor,
    bank: Tensor,
    groups: Tensor,
    *,
    boundaries: Boundaries,
    tau: float,
    operand: torch.dtype,
    with_grad: bool,
    rows: int,
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
        rows: anchors held against the N patches at a time.
    """
    grad_z = torch.zeros_like(z) if with_grad else None  # (N, D')
    sums = z.new_zeros(8)
    how = {"boundaries": boundaries, "tau": tau, "operand": operand, "grad_z": grad_z, "rows": rows}
    for part in groups.split(max(1, rows // groups.shape[1])):  # (g, A_max)
        sums += _add_groups(part, z, bank, **how)
    return BatchSums(sums[:4], grad_z, reached=sums[4:])


def _add_groups(
    groups: Tensor,
    z: Tensor,
    bank: Tensor,
    *,
    boundaries: Boundaries,
    tau: float,
    operand: torch.dtype,
    grad_z: Tensor | None,
    rows: int,
) -> Tensor:
    """Sums over the anchors of some groups, (8,); adds their gradient to `grad_z` (N, D).

    Both are still to be divided by the weight of all groups. An anchor's weight hangs on how many anchors
    of its group have a positive, so that must be known first.
    """
    how = {"boundaries": boundaries, "operand": operand}
    drawn = groups >= 0  # (g, A_max)
    parts = groups.flatten().clamp_min(0).split(rows)  # (a,) each
    found = _find(parts[0], bank, **how) if len(parts) == 1 else None
    if found is not None:
        valid = found.sets.positives.any(dim=1)  # (A,)
    else:
        valid = torch.cat([_find(part, bank, **how).sets.positives.any(dim=1) for part in parts])  # (A,)
    weights = anchor_weights(valid, drawn)
    loss, counts, reached = z.new_zeros(()), z.new_zeros(2), z.new_zeros(4)
    for part, weight, used in zip(parts, weights.each.split(rows), drawn.flatten().split(rows), strict=True):
        here = _find(part, bank, **how) if found is None else found
        loss += _add_rows(part, z, here.sets, weight=weight, tau=tau, grad_z=grad_z)
        size = here.sets.positives.sum(dim=1)  # (A,)
        counts += (torch.stack([size, here.sets.below]) * used).sum(dim=1)  # (2,)
        reached += (torch.stack([*here.path, size == 0]) * used).sum(dim=1)  # (4,)
    return torch.stack([loss, weights.total.to(z.dtype), *counts, *reached])


@dataclass(frozen=True)
class _Found:
    """P and Q of A anchors, and Phi_T, Psi_T and m_1 + ... + m_T, (A,) each; similarities are let go."""

    sets: Sets
    path: tuple[Tensor, Tensor, Tensor]


def _find(index: Tensor, bank: Tensor, *, boundaries: Boundaries, operand: torch.dtype) -> _Found:
    """P and Q of the anchors at `index` (A,) in the bank (N, D)."""
    reached = propagate(bank[index], bank, boundaries, operand=operand)
    path = (reached.phi[:, 0], reached.psi[:, 0], reached.moved[:, 0])
    return _Found(select_sets(reached, index), path)


def _add_rows(
    index: Tensor, z: Tensor, sets: Sets, *, weight: Tensor, tau: float, grad_z: Tensor | None
) -> Tensor:
    """Weighted sum of L_i over the anchors at `index` (A,), (); adds its gradient to `grad_z` (N, D)."""
    term = masked_contrastive(
        (z[index] / tau) @ z.T,  # (A, N)
        sets.positives,
        kept=sets.positives | sets.negatives,
        tau=tau,
        with_slope=grad_z is not None,
    )
    if grad_z is not None:
        slope = term.slope.mul_((weight / tau)[:, None])  # (A, N)
        grad_z.addmm_(slope.T, z[index])
        grad_z.index_add_(0, index, slope @ z)
    return (term.loss * weight).sum()
