"""The loss of HP: contrasts every patch with its hidden positives, block by block.

Seong, Moon, Lee, Heo, "Leveraging Hidden Positives for Unsupervised Semantic Segmentation", CVPR 2023. Two
patches are positives if their similarity exceeds that of one of them to every entry of a reference pool, in
the frozen features (task-agnostic) or in the code of a momentum-averaged head (task-specific).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loss.contrastive import BASE_TEMPERATURE
from loss.kernels import fused, matmul
from loss.ppap import ieee_float32
from utils.training.distributed import all_gather, all_reduce, own_groups


def hidden_positive_loss(
    z: Tensor,
    z_mix: Tensor,
    *,
    f: Tensor,
    e: Tensor,
    pool_ag: Tensor,
    pool_sp: Tensor,
    keep: Tensor,
    spatial_size: int,
    lmbd: float,
    tau: float,
    reweighting: bool = True,
    weight_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The mean loss of z and of z_mix over blocks of patches, () float32, differentiable in both.

    Blocks have `spatial_size`^2 consecutive patches, each of which is an anchor if it has a task-agnostic
    positive. Blocks without anchors are skipped. No tensor is larger than (block, N) or (block, pool).

    With several processes, z, z_mix, f and e are this rank's equal slice of the batch, everything else is the
    same on all ranks, and each rank computes its share of the blocks. The value is that of the whole batch,
    the gradient this share's part of it.

    Args:
        z, z_mix: projections of the code and of the mixed code, (N, K), unit length, in (image, row, column)
            order.
        f: frozen features, (N, D), unit length.
        e: code of the momentum-averaged head, (N, K'), unit length.
        pool_ag, pool_sp: reference features (M, D) and codes (M, K'), unit length.
        keep: patches of the denominator in addition to the positives, of every block: (block, N) bool.
        spatial_size: side of the patch grid.
        lmbd: lambda, the weight of task-specific positives.
        tau: the temperature.
        reweighting: weight anchors by their positives.
        weight_dtype: what W and its sums are rounded to; float16 is what the published code does.
    """
    size = spatial_size**2
    if not len(z) == len(z_mix) == len(f) == len(e) or len(z) % size:
        lengths = [len(rows) for rows in (z, z_mix, f, e)]
        raise ValueError(
            f"z, z_mix, f and e have {lengths} rows, must have equally many, a multiple of {size}"
        )
    with torch.autocast(z.device.type, enabled=False), ieee_float32():
        z, z_mix, f, e = (all_gather(rows.float()) for rows in (z, z_mix, f.detach(), e.detach()))
        thresholds = _largest(f, pool_ag.float(), size), _largest(e, pool_sp.float(), size)
        positives = _Positives(f, e, *thresholds, lmbd, keep, weight_dtype)
        return _Loss.apply(z, z_mix, positives, size, tau, reweighting)


def _largest(rows: Tensor, pool: Tensor, size: int) -> Tensor:
    """Largest similarity to the pool, (N, D) and (M, D) -> (N,)."""
    return torch.cat([matmul(part, pool.T).amax(dim=1) for part in rows.split(size)])


@dataclass(frozen=True)
class _Positives:
    """Finds the positives of a block of patches."""

    f: Tensor  # (N, D)
    e: Tensor  # (N, K')
    least_ag: Tensor  # R, (N,)
    least_sp: Tensor  # Q, (N,)
    lmbd: float
    keep: Tensor  # (n, N) bool
    weight_dtype: torch.dtype

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For patches (n,): W (n, N), the denominator (n, N) bool and the anchors (n,) bool."""
        agnostic = _above(self.f, self.least_ag, rows)  # (n, N)
        weight = agnostic.to(self.weight_dtype)  # (n, N)
        if self.lmbd:
            weight.add_(_above(self.e, self.least_sp, rows), alpha=self.lmbd)
        kept = (agnostic | self.keep).scatter_(1, rows[:, None], False)  # (n, N)
        return weight, kept, agnostic.any(dim=1)


def _above(vectors: Tensor, least: Tensor, rows: Tensor) -> Tensor:
    """Whether the similarity of patches (n,) and all patches exceeds the threshold of either, (n, N) bool."""
    similarity = matmul(vectors[rows], vectors.T)  # (n, N)
    above = (similarity > least[rows, None]).logical_or_(similarity > least)
    return above.scatter_(1, rows[:, None], False)  # never a patch itself


class _Loss(torch.autograd.Function):
    """Loss and gradients in one pass; stores nothing of size block x N."""

    @staticmethod
    def forward(
        ctx, z: Tensor, z_mix: Tensor, positives: _Positives, size: int, tau: float, reweighting: bool
    ):
        scale, grads = tau / BASE_TEMPERATURE, [torch.zeros_like(z), torch.zeros_like(z_mix)]  # (N, K)
        sums = z.new_zeros(2)  # of the losses of blocks, and of blocks that have anchors
        starts = own_groups(torch.arange(0, len(z), size)[:, None])  # (blocks, 1)
        for start in starts[starts >= 0].tolist():
            rows = torch.arange(start, start + size, device=z.device)  # (n,)
            weight, kept, anchors = positives.of(rows)
            coefficient = scale * _coefficients(weight.sum(dim=1).float(), anchors, reweighting)  # (n,)
            sums[1] += anchors.any()
            for projections, grad in zip((z, z_mix), grads, strict=True):
                block = projections[rows] / tau  # (n, K)
                logits = matmul(block, projections.T)  # (n, N)
                loss, slope = weighted_contrastive(logits, weight, kept, coefficient)
                sums[0] += loss / 2
                matmul(slope.T, block, out=grad, beta=1)
                grad[start : start + size] += matmul(slope, projections) / tau
        total, blocks = all_reduce(sums).unbind()
        blocks = blocks.clamp_min(1)  # without any anchor: 0 / 1
        ctx.save_for_backward(*(grad.div_(2 * blocks) for grad in grads))
        return total / blocks

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        return *(grad_loss * grad for grad in ctx.saved_tensors), None, None, None, None


def _coefficients(weights: Tensor, anchors: Tensor, reweighting: bool) -> Tensor:
    """r_i / (A * w_i) for each of A anchors, 0 for others, (n,), where `weights` are the row sums w of W."""
    if reweighting:  # w_i cancels
        return anchors / (weights * anchors).sum().clamp_min(1)
    return anchors / (weights.clamp_min(1) * anchors.sum().clamp_min(1))


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
    kept_logits = torch.where(kept, logits, -torch.inf)  # (n, N)
    top = kept_logits.amax(dim=1).clamp_min(torch.finfo(logits.dtype).min)  # (n,)
    exponent = kept_logits.sub_(top[:, None]).exp_()  # (n, N)
    total = exponent.sum(dim=1)  # (n,)
    total = torch.where(total > 0, total, 1.0)
    weights = weight.sum(dim=1)  # (n,)
    terms = weights * (top + total.log()) - torch.einsum("an,an->a", logits, weight)  # (n,)
    slope = exponent.mul_((weights * coefficient / total)[:, None])  # (n, N)
    slope.addcmul_(weight, coefficient[:, None], value=-1)
    return torch.where(coefficient > 0, coefficient * terms, 0.0).sum(), slope
