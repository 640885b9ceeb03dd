"""The contrastive loss of an anchor, and how anchors are averaged over groups and the batch.

The term is that of supervised contrastive learning (Khosla et al., NeurIPS 2020), scaled by tau / 0.07.
"""

import torch
from torch import Tensor

from loss.kernels import fused

BASE_TEMPERATURE = 0.07


def anchor_weights(valid: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of each anchor, (A,) float32, and their sum, () int64.

    A group's loss is the mean over its anchors with a positive; groups are weighted by their anchors.

    Args:
        valid: whether an anchor has a positive, (A,) bool with A = g * A_max.
        drawn: whether an entry holds an anchor, (g, A_max) bool.
    """
    counted = valid.view_as(drawn) & drawn  # (g, A_max)
    per_group = counted.sum(dim=1, keepdim=True)  # (g, 1), anchors that have a positive
    size = drawn.sum(dim=1, keepdim=True) * (per_group > 0)  # (g, 1), the group's weight
    return (counted * size / per_group.clamp_min(1)).flatten(), size.sum()


@fused
def masked_contrastive(
    logits: Tensor, positives: Tensor, negatives: Tensor, tau: float, grad: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """L_i = - tau/0.07 * mean over P of log(exp(logit_ip) / sum over P and Q of exp(logit_iq)).

    Args:
        logits: z_i . z_j / tau, (A, N) float32.
        positives, negatives: P and Q, (A, N) bool; they may overlap.
        tau: the temperature; here only the factor tau/0.07.
        grad: gradient of L_i, (A, 1); None if that of the logits, of `dtype`, is not needed.

    Returns:
        L_i, (A,) float32, 0 for an anchor without positives; and grad * dL_i / dlogits, (A, N), or None.
    """
    scale = tau / BASE_TEMPERATURE
    members = positives.to(logits.dtype)  # (A, N), 1 on P: faster to multiply and sum than bool
    count = members.sum(dim=1)  # (A,)
    valid = count > 0
    kept_logits = torch.where(positives | negatives, logits, -torch.inf)  # (A, N)
    top = kept_logits.detach().amax(dim=1)  # (A,)
    top = top.masked_fill(top == -torch.inf, 0)  # an anchor without P may keep nothing
    exponent = kept_logits.sub_(top[:, None]).exp_()  # (A, N)
    total = torch.where(valid, exponent.sum(dim=1), 1.0)  # (A,)
    compiling = torch.compiler.is_compiling()  # fuses the product, which is one more (A, N) tensor otherwise
    added = (logits * members).sum(dim=1) if compiling else torch.einsum("an,an->a", logits, members)  # (A,)
    mean = added / count.clamp_min(1)  # (A,), over the positives
    loss = torch.where(valid, scale * (top + total.log() - mean), 0.0)  # (A,)
    if grad is None:
        return loss, None
    scale = scale * valid  # (A,)
    slope = exponent.mul_((scale / total)[:, None])  # (A, N)
    slope.addcmul_(members, (scale / count.clamp_min(1))[:, None], value=-1)
    return loss, slope.mul_(grad).to(dtype)
