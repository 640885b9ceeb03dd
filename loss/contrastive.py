"""The masked contrastive term: a pure function of logits, positives and the patches kept.

The form follows supervised contrastive learning (Khosla et al., NeurIPS 2020) with its scale of
tau / 0.07; PPAP's part is which patches count as positives and which are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BASE_TEMPERATURE = 0.07


@dataclass(frozen=True)
class ContrastiveTerm:
    """The term of A anchors and its slope.

    Attributes:
        loss: L_i, (A,) float32; 0 for an anchor without positives.
        slope: dL_i / dlogits, (A, N) float32, or None where it was not asked for.
    """

    loss: Tensor
    slope: Tensor | None


@dataclass(frozen=True)
class BatchSums:
    """What a batch's anchors add up to.

    Attributes:
        sums: weighted loss, weight, |P|, |{below Psi}|, (4,) float32.
        grad_z: gradient of the weighted loss, (N, D') float32, or None where it was not asked for.
        reached: Phi_T, Psi_T, m_1 + ... + m_T and 1 for each anchor without a positive, (4,) float32; None
            where nobody kept count.
    """

    sums: Tensor
    grad_z: Tensor | None
    reached: Tensor | None = None


@dataclass(frozen=True)
class AnchorWeights:
    """How much A anchors count in the sum that the loss is the mean of.

    Attributes:
        each: (A,) float32: its group's anchors over those with a positive; 0 for an anchor without one.
        total: the anchors drawn in groups that have a positive, () int64.
    """

    each: Tensor
    total: Tensor


def anchor_weights(valid: Tensor, drawn: Tensor) -> AnchorWeights:
    """Weights that make a group's loss a mean over its valid anchors and the batch's one over anchors drawn.

    Args:
        valid: whether an anchor has a positive, (A,) bool with A = g * A_max.
        drawn: whether a place holds an anchor, (g, A_max) bool.
    """
    counted = valid.view_as(drawn) & drawn  # (g, A_max)
    per_group = counted.sum(dim=1, keepdim=True)  # (g, 1), anchors that have a positive
    size = drawn.sum(dim=1, keepdim=True) * (per_group > 0)  # (g, 1), the group's weight
    return AnchorWeights((counted * size / per_group.clamp_min(1)).flatten(), size.sum())


def masked_contrastive(
    logits: Tensor, positives: Tensor, *, kept: Tensor, tau: float, with_slope: bool = False
) -> ContrastiveTerm:
    """L_i = - tau/0.07 * mean over P of log(exp(logit_ip) / sum over `kept` of exp(logit_iq)).

    Differentiable in `logits`; `with_slope` adds the derivative in closed form, so that a caller who
    streams over anchors need not keep the graph of an (A, N) tensor.

    Args:
        logits: z_i . z_j / tau, (A, N) float32.
        positives: P, (A, N) bool; a subset of `kept`.
        kept: P united with Q, (A, N) bool.
        tau: the temperature, of which only the outer factor is left here.
        with_slope: whether to fill `slope`.
    """
    scale = tau / BASE_TEMPERATURE
    members = positives.to(logits.dtype)  # (A, N), 1 on P: quicker to multiply by and to add up than bools
    count = members.sum(dim=1)  # (A,)
    valid = count > 0
    kept_logits = logits.masked_fill(~kept, -torch.inf)  # (A, N)
    top = kept_logits.detach().amax(dim=1)  # (A,)
    top = top.masked_fill(top == -torch.inf, 0)  # without P there may be no kept one
    exponent = kept_logits.sub_(top[:, None]).exp_()  # (A, N)
    total = torch.where(valid, exponent.sum(dim=1), 1.0)  # (A,)
    mean = torch.einsum("an,an->a", logits, members) / count.clamp_min(1)  # (A,), of the positives' logits
    loss = torch.where(valid, scale * (top + total.log() - mean), 0.0)  # (A,)
    slope = None
    if with_slope:
        with torch.no_grad():
            slope = exponent.clone() if exponent.requires_grad else exponent
            factor = scale * valid  # (A,)
            slope.mul_((factor / total)[:, None])
            slope.addcmul_(members, (factor / count.clamp_min(1))[:, None], value=-1)  # (A, N)
    return ContrastiveTerm(loss, slope)
