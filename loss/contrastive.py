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
    count = positives.sum(dim=1)  # (A,)
    valid = count > 0
    share = positives.to(logits.dtype) / count.clamp_min(1)[:, None]  # (A, N), 1/|P| on P
    kept_logits = logits.masked_fill(~kept, -torch.inf)  # (A, N)
    kept_logits = torch.where(valid[:, None], kept_logits, 0.0)  # an empty row has no log-sum-exp
    log_total = kept_logits.logsumexp(dim=1)  # (A,)
    loss = torch.where(valid, scale * (log_total - (logits * share).sum(dim=1)), 0.0)  # (A,)
    slope = None
    if with_slope:
        probability = (kept_logits - log_total[:, None]).exp_()  # (A, N)
        slope = (probability.sub_(share).mul_(scale)) * valid[:, None]  # (A, N)
    return ContrastiveTerm(loss, slope)
