"""Progressive proxy anchor propagation: finds the positives and negatives of an anchor.

Seong, Moon, Lee, Heo, "Progressive Proxy Anchor Propagation for Unsupervised Semantic Segmentation",
ECCV 2024. Pure functions of tensors: deterministic, stateless and without gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from loss.kernels import compare, fused, matmul


@dataclass(frozen=True)
class Boundaries:
    """Coefficients of the propagation."""

    phi: float  # Phi_0, the tight initial boundary of the positives (`initialcrit_pos`)
    psi: float  # Psi_0, the initial lower edge of the ambiguous zone (`initialcrit_amb`)
    steps: int  # T, the number of relocations (`prop_iter`); with 0 the initial similarities decide
    sigma_pos: float  # damping of the Phi update; infinity keeps Phi fixed
    sigma_amb: float  # damping of the Psi update; infinity keeps Psi fixed
    operand: torch.dtype = torch.float32  # proxies are rounded to it before they are compared with the bank


@dataclass(frozen=True)
class Propagation:
    """The proxies of A anchors after t relocations, in a bank of N patches; all float32."""

    proxies: Tensor  # v_t, (A, D), unit length
    similarity: Tensor  # v_t . f_j, (A, N)
    phi: Tensor  # Phi_t, (A, 1); patches above it are positives
    psi: Tensor  # Psi_t, (A, 1); patches below it are negatives
    moved: Tensor  # m_1 + ... + m_t, (A, 1)


@dataclass(frozen=True)
class Sets:
    """P and Q of A anchors; they overlap if Psi_T is above Phi_T."""

    positives: Tensor  # P, (A, N) bool, without the anchor itself
    negatives: Tensor  # Q, (A, N) bool, without the anchor itself
    below: Tensor  # size of {v_T . f_j < Psi_T}, the anchor itself included, (A,) int32


@torch.no_grad()
def propagations(anchors: Tensor, bank: Tensor, boundaries: Boundaries) -> Iterator[Propagation]:
    """Relocates each anchor's proxy to the mean of its positives and adapts its boundaries, step by step.

    If P_{t-1} is empty, the proxy stays and m_t is 0.

    Args:
        anchors: f_i of the anchors, (A, D) float32, unit length.
        bank: f_j of every patch of the batch, (N, D) float32, unit length; or their float16 `operands`.
        boundaries: the coefficients.

    Yields:
        The propagation for t = 0..T. The next step overwrites `similarity`.
    """
    proxies = anchors  # v_0 = f_i
    phi = anchors.new_full((len(anchors), 1), boundaries.phi)  # (A, 1)
    psi = anchors.new_full((len(anchors), 1), boundaries.psi)  # (A, 1)
    moved, dim = torch.zeros_like(phi), anchors.shape[1]
    similarity = compare(proxies, bank, boundaries.operand)  # (A, N)
    yield Propagation(proxies, similarity, phi, psi, moved)
    for _ in range(boundaries.steps):
        inside, size = _members(similarity, phi, bank.dtype)  # P_{t-1}
        parts = matmul(inside, bank[:, : 2 * dim]).split(dim, dim=1)  # (A, D), or two of hi and lo
        mean = reduce(torch.add, parts) / size.clamp_min(1)  # (A, D); its length does not matter
        relocated = torch.where(size > 0, F.normalize(mean, dim=1), proxies)  # proxy anchor relocation
        degree = 1 - (proxies * relocated).sum(dim=1, keepdim=True)  # (A, 1), degree of propagation m_t
        degree = torch.where(size > 0, degree, 0)
        phi = phi - degree / boundaries.sigma_pos  # adaptive positiveness boundary
        psi = psi + degree / boundaries.sigma_amb  # lower edge of the ambiguous zone
        proxies, moved = relocated, moved + degree
        compare(proxies, bank, boundaries.operand, out=similarity)
        yield Propagation(proxies, similarity, phi, psi, moved)


def propagate(anchors: Tensor, bank: Tensor, boundaries: Boundaries) -> Propagation:
    """The propagation after the last step, t = T; arguments as for `propagations`."""
    *_, last = propagations(anchors, bank, boundaries)
    return last


def select_sets(reached: Propagation, index: Tensor) -> Sets:
    """P = {v_T . f_j > Phi_T} and Q = {v_T . f_j < Psi_T} of the anchors at `index` (A,) in the bank."""
    positives = (reached.similarity > reached.phi).scatter_(1, index[:, None], False)  # (A, N)
    negatives = reached.similarity < reached.psi  # (A, N)
    below = negatives.sum(dim=1, dtype=torch.int32)  # (A,); int64 takes ten times as long
    return Sets(positives, negatives.scatter_(1, index[:, None], False), below)


@fused
def _members(similarity: Tensor, phi: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """1 where similarity is above phi, (A, N) of `dtype`, and its sums (A, 1); may overwrite `similarity`."""
    in_place = dtype == torch.float32 and not torch.compiler.is_compiling()  # as new memory is slower
    inside = similarity.gt_(phi) if in_place else (similarity > phi).to(dtype)
    return inside, inside.sum(dim=1, keepdim=True, dtype=torch.float32)
