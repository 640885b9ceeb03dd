"""Progressive proxy anchor propagation: from an anchor to its positives and negatives.

Seong, Moon, Lee, Heo, "Progressive Proxy Anchor Propagation for Unsupervised Semantic Segmentation",
ECCV 2024. Pure functions on tensors: nothing here is random, stateful or in need of a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Boundaries:
    """The coefficients of the propagation.

    Attributes:
        phi: Phi_0, the tight initial boundary of the positives (`initialcrit_pos`).
        psi: Psi_0, the initial lower edge of the ambiguous zone (`initialcrit_amb`).
        steps: T, the number of relocations (`prop_iter`); with 0 the initial similarities decide.
        sigma_pos: how little Phi sinks as the proxy moves; infinity keeps it where it is.
        sigma_amb: how little Psi rises as the proxy moves; infinity keeps it where it is.
    """

    phi: float
    psi: float
    steps: int
    sigma_pos: float
    sigma_amb: float


@dataclass(frozen=True)
class Propagation:
    """Where the proxies of A anchors have come to, in a bank of N patches.

    Attributes:
        proxies: v_T, (A, D) float32, unit length.
        similarity: v_T . f_j, (A, N) float32.
        phi: Phi_T, (A, 1) float32: a patch above it is a positive.
        psi: Psi_T, (A, 1) float32: a patch below it is a negative.
        moved: m_1 + ... + m_T, (A, 1) float32; None where nobody kept count.
    """

    proxies: Tensor
    similarity: Tensor
    phi: Tensor
    psi: Tensor
    moved: Tensor | None = None


@dataclass(frozen=True)
class Proxies:
    """The proxies of A anchors on their way.

    Attributes:
        vectors: v_t, (A, D) float32, unit length.
        phi: Phi_t, (A, 1) float32.
        psi: Psi_t, (A, 1) float32.
        moved: m_1 + ... + m_t, (A, 1) float32.
    """

    vectors: Tensor
    phi: Tensor
    psi: Tensor
    moved: Tensor


def start(anchors: Tensor, boundaries: Boundaries) -> Proxies:
    """v_0 = f_i (A, D) float32 with Phi_0 and Psi_0."""
    phi = anchors.new_full((len(anchors), 1), boundaries.phi)  # (A, 1)
    psi = anchors.new_full((len(anchors), 1), boundaries.psi)  # (A, 1)
    return Proxies(anchors, phi, psi, torch.zeros_like(phi))


def relocate(proxies: Proxies, total: Tensor, *, size: Tensor, boundaries: Boundaries) -> Proxies:
    """Moves each proxy to the mean of its positives and its boundaries by how far that is.

    Args:
        proxies: v_{t-1} with its boundaries.
        total: sum of f_j over P_{t-1}, (A, D) float32.
        size: |P_{t-1}|, (A, 1) float32; where it is 0 the proxy stays where it is (m_t = 0).
        boundaries: the coefficients.
    """
    mean = total / size.clamp_min(1)  # (A, D)
    relocated = torch.where(size > 0, F.normalize(mean, dim=1), proxies.vectors)  # proxy anchor relocation
    moved = 1 - (proxies.vectors * relocated).sum(dim=1, keepdim=True)  # (A, 1), degree of propagation
    moved = torch.where(size > 0, moved, 0)
    phi = proxies.phi - moved / boundaries.sigma_pos  # adaptive positiveness boundary
    psi = proxies.psi + moved / boundaries.sigma_amb  # lower edge of the ambiguous zone
    return Proxies(relocated, phi, psi, proxies.moved + moved)


def compare(proxies: Tensor, bank: Tensor, *, operand: torch.dtype, out: Tensor | None = None) -> Tensor:
    """v . f_j of proxies (A, D), rounded to `operand` first, and patches (N, D); (A, N) float32."""
    return torch.mm(proxies.to(operand).float(), bank.T, out=out)


@torch.no_grad()
def propagations(
    anchors: Tensor, bank: Tensor, boundaries: Boundaries, *, operand: torch.dtype = torch.float32
) -> Iterator[Propagation]:
    """Moves each anchor's proxy to where its neighbours are densest and adapts its boundaries, step by step.

    An empty P_{t-1} leaves the proxy where it is (m_t = 0).

    Args:
        anchors: f_i of the anchors, (A, D) float32, unit length.
        bank: f_j of every patch of the batch, (N, D) float32, unit length.
        boundaries: the coefficients.
        operand: what a proxy is rounded to before it is compared with the bank; sums stay float32.

    Yields:
        Where the proxies have come to for t = 0..T. The next step overwrites `similarity`.
    """
    proxies = start(anchors, boundaries)
    similarity = compare(proxies.vectors, bank, operand=operand)
    yield Propagation(proxies.vectors, similarity, proxies.phi, proxies.psi, proxies.moved)
    for _ in range(boundaries.steps):
        inside = similarity.gt_(proxies.phi)  # (A, N), 1 on P_{t-1}; in place, as fresh memory costs more
        size = inside.sum(dim=1, keepdim=True)  # (A, 1)
        proxies = relocate(proxies, inside @ bank, size=size, boundaries=boundaries)
        compare(proxies.vectors, bank, operand=operand, out=similarity)
        yield Propagation(proxies.vectors, similarity, proxies.phi, proxies.psi, proxies.moved)


def propagate(
    anchors: Tensor, bank: Tensor, boundaries: Boundaries, *, operand: torch.dtype = torch.float32
) -> Propagation:
    """Where the proxies have come to for t = T; arguments as of `propagations`."""
    *_, reached = propagations(anchors, bank, boundaries, operand=operand)
    return reached


@dataclass(frozen=True)
class Sets:
    """P and Q of A anchors; they overlap where Psi_T lies above Phi_T.

    Attributes:
        positives: P, (A, N) bool, without the anchor itself.
        negatives: Q, (A, N) bool, without the anchor itself.
        below: count of {v_T . f_j < Psi_T}, (A,) int32, the anchor itself included.
    """

    positives: Tensor
    negatives: Tensor
    below: Tensor


def select_sets(reached: Propagation, index: Tensor) -> Sets:
    """P = {v_T . f_j > Phi_T} and Q = {v_T . f_j < Psi_T}.

    Args:
        reached: where the proxies have come to.
        index: each anchor's own place in the bank, (A,) int64.
    """
    positives = (reached.similarity > reached.phi).scatter_(1, index[:, None], False)  # (A, N)
    negatives = reached.similarity < reached.psi  # (A, N)
    below = negatives.sum(dim=1, dtype=torch.int32)  # (A,), a tenth of the time that int64 takes
    return Sets(positives, negatives.scatter_(1, index[:, None], False), below)
