"""Contrastive losses on given sets, with their derivatives.

The term of an anchor is that of supervised contrastive learning (Khosla et al., NeurIPS 2020), scaled by
tau / 0.07.
"""

import torch
from torch import Tensor

from loss.kernels import fused

BASE_TEMPERATURE = 0.07


@fused
def masked_contrastive(
    logits: Tensor, positives: Tensor, negatives: Tensor, tau: float, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """L_i = - tau/0.07 * mean over P of log(exp(logit_ip) / sum over P and Q of exp(logit_iq)).

    Args:
        logits: z_i . z_j / tau, (A, N) float32.
        positives, negatives: P and Q, (A, N) bool; they may overlap.
        tau: the temperature; here only the factor tau/0.07.
        grad: the gradient of L_i, (A, 1).
        dtype: of the gradient of the logits.

    Returns:
        L_i, (A,) float32, 0 for an anchor without positives; and grad * dL_i / dlogits, (A, N).
    """
    members = positives.to(logits.dtype)  # (A, N), 1 on P: faster to multiply and sum than bool
    count = members.sum(dim=1)  # (A,)
    valid = count > 0
    exponent, total, log_total = _exponentials(logits, positives | negatives)
    compiling = torch.compiler.is_compiling()  # fuses the product, which is one more (A, N) tensor otherwise
    added = (logits * members).sum(dim=1) if compiling else torch.einsum("an,an->a", logits, members)  # (A,)
    mean = added / count.clamp_min(1)  # (A,), over the positives
    scale = tau / BASE_TEMPERATURE
    loss = torch.where(valid, scale * (log_total - mean), 0.0)  # (A,)
    scale = scale * valid  # (A,)
    slope = exponent.mul_((scale / total)[:, None])  # (A, N)
    slope.addcmul_(members, (scale / count.clamp_min(1))[:, None], value=-1)
    return loss, slope.mul_(grad).to(dtype)


@fused
def weighted_contrastive(
    logits: Tensor, weight: Tensor, kept: Tensor, coefficient: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over i of c_i * sum over j of -W_ij * log(exp(logit_ij) / sum over kept k of exp(logit_ik)).

    Args:
        logits: z_i . z_j / tau, (n, N) float32.
        weight: W, (n, N) of any float dtype.
        kept: the denominator, (n, N) bool.
        coefficient: c, (n,); 0 if nothing is kept.

    Returns:
        The sum, (), and its derivative by the logits, (n, N).
    """
    weight = weight.float()  # (n, N)
    exponent, total, log_total = _exponentials(logits, kept)
    weights = weight.sum(dim=1)  # (n,)
    terms = weights * log_total - torch.einsum("an,an->a", logits, weight)  # (n,)
    slope = exponent.mul_((weights * coefficient / total)[:, None])  # (n, N)
    slope.addcmul_(weight, coefficient[:, None], value=-1)
    return (coefficient * terms).sum(), slope


def _exponentials(logits: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logit - maximum) of the kept, otherwise 0, (A, N); its sums and log sums of exp(logit), (A,).

    The sum is 1 if nothing is kept.
    """
    kept_logits = torch.where(kept, logits, -torch.inf)  # (A, N)
    top = kept_logits.amax(dim=1)  # (A,)
    top = top.masked_fill(top == -torch.inf, 0)  # nothing is kept
    exponent = kept_logits.sub_(top[:, None]).exp_()  # (A, N)
    total = exponent.sum(dim=1)  # (A,)
    total = torch.where(total > 0, total, 1.0)
    return exponent, total, top + total.log()
