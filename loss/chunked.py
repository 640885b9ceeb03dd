"""The loss by matrix products over chunks of anchors: nothing larger than a chunk x N is held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loss.contrastive import BatchSums, anchor_weights, masked_contrastive
from loss.propagation import Boundaries, Propagation, Proxies, Sets, compare, propagate, select_sets


def chunked_sums(
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
    of its group have a positive, so all are propagated first.
    """
    drawn = groups >= 0  # (g, A_max)
    index = groups.flatten().clamp_min(0)  # (A,)
    parts = index.chunk(-(-len(index) // rows))  # alike in size: a product with few rows is slow
    how = {"boundaries": boundaries, "operand": operand, "keep_sets": len(parts) == 1}
    found = [_find(part, bank, **how) for part in parts]
    tally = torch.cat([here.tally for here in found])  # (A, 6)
    weights = anchor_weights(tally[:, 0] > 0, drawn)
    loss = z.new_zeros(())
    for here, weight in zip(found, weights.each.split(len(parts[0])), strict=True):
        sets = here.sets or _select(here.settled, here.index, bank, operand)
        loss += _add_rows(here.index, z, sets, weight=weight, tau=tau, grad_z=grad_z)
    sums = (tally * drawn.view(-1, 1)).sum(dim=0)  # (6,)
    return torch.cat([torch.stack([loss, weights.total.to(z.dtype)]), sums.to(z.dtype)])


@dataclass(frozen=True)
class _Found:
    """What A anchors have come to. Without `sets` nothing as large as (A, N) is held.

    Attributes:
        index: the anchors' places in the bank, (A,) int64.
        settled: where their proxies are.
        tally: |P|, |{below Psi_T}|, Phi_T, Psi_T, m_1 + ... + m_T and whether P is empty, (A, 6) float64.
        sets: P and Q; None where they are to be selected again.
    """

    index: Tensor
    settled: Proxies
    tally: Tensor
    sets: Sets | None


def _find(
    index: Tensor, bank: Tensor, *, boundaries: Boundaries, operand: torch.dtype, keep_sets: bool
) -> _Found:
    """Propagates the anchors at `index` (A,) in the bank (N, D)."""
    reached = propagate(bank[index], bank, boundaries, operand=operand)
    sets = select_sets(reached, index)
    size = sets.positives.sum(dim=1, dtype=torch.int32)  # (A,)
    phi, psi, moved = reached.phi[:, 0], reached.psi[:, 0], reached.moved[:, 0]
    tally = torch.stack([t.double() for t in (size, sets.below, phi, psi, moved, size == 0)], dim=1)
    settled = Proxies(reached.proxies, reached.phi, reached.psi, reached.moved)
    return _Found(index, settled, tally, sets if keep_sets else None)


def _select(settled: Proxies, index: Tensor, bank: Tensor, operand: torch.dtype) -> Sets:
    """P and Q of the anchors at `index` (A,) by one product, as their proxies are known."""
    similarity = compare(settled.vectors, bank, operand=operand)  # (A, N)
    return select_sets(Propagation(settled.vectors, similarity, settled.phi, settled.psi), index)


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
