"""The loss of HP: contrasts every patch with its hidden positives, block by block.

Seong, Moon, Lee, Heo, "Leveraging Hidden Positives for Unsupervised Semantic Segmentation", CVPR 2023. Two
patches are positives if their similarity exceeds that of one of them to every entry of a reference pool, in
the frozen features (task-agnostic) or in the code of a momentum-averaged head (task-specific).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from loss.contrastive import BASE_TEMPERATURE, weighted_contrastive
from loss.kernels import ieee_float32, matmul, with_gradient
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
    weight_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The mean loss of z and of z_mix over blocks of patches, () float32, differentiable in both.

    Blocks have `spatial_size`^2 consecutive patches, each of which is an anchor if it has a task-agnostic
    positive. Blocks without anchors are skipped. No tensor is larger than (block, N) or (block, pool).

    With several processes, z, z_mix, f and e are this rank's equal slice of the batch, everything else is the
    same on all ranks, and each rank computes its share of the blocks. The value is that of the whole batch,
    the gradient this share's part of it.

    Args:
        z, z_mix: projections of the code and of the mixed code, (N, K), rows in (image, row, column) order.
        f, e: frozen features (N, D), code of the momentum-averaged head (N, K').
        pool_ag, pool_sp: reference features (M, D) and codes (M, K'); all vectors have unit length.
        keep: patches of the denominator in addition to the positives, of every block: (block, N) bool.
        spatial_size: side of the patch grid.
        lmbd: lambda, the weight of task-specific positives.
        tau: the temperature.
        reweighting: weight anchors by their positives.
        weight_dtype: what W and its sums are rounded to; the published code rounds to float16.
    """
    size = spatial_size**2
    with torch.autocast(z.device.type, enabled=False), ieee_float32():
        z, z_mix, f, e = (all_gather(rows.float()) for rows in (z, z_mix, f.detach(), e.detach()))
        agnostic, specific = _Positives(f, pool_ag.float(), size), _Positives(e, pool_sp.float(), size)
        weights = partial(_weights, agnostic, specific, keep, lmbd=lmbd, dtype=weight_dtype)
        return _mean_over_blocks((z, z_mix), weights, size, tau=tau, reweighting=reweighting)


class _Positives:
    """Finds patches whose similarity exceeds that of one of them to every entry of a pool."""

    def __init__(self, vectors: Tensor, pool: Tensor, size: int) -> None:
        self.vectors = vectors  # (N, D)
        # the largest similarities to the pool, (N,), a block at a time
        self.least = torch.cat([matmul(part, pool.T).amax(dim=1) for part in vectors.split(size)])

    def of(self, rows: Tensor) -> Tensor:
        """The positives of patches (n,), (n, N) bool; never a patch itself."""
        similarity = matmul(self.vectors[rows], self.vectors.T)  # (n, N)
        above = (similarity > self.least[rows, None]).logical_or_(similarity > self.least)
        return above.scatter_(1, rows[:, None], False)


def _weights(
    agnostic: _Positives, specific: _Positives, keep: Tensor, rows: Tensor, *, lmbd: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """For patches (n,): W (n, N), the denominator (n, N) bool and the anchors (n,) bool."""
    positives = agnostic.of(rows)  # (n, N)
    weight = positives.to(dtype)  # (n, N)
    if lmbd:
        weight.add_(specific.of(rows), alpha=lmbd)
    kept = (positives | keep).scatter_(1, rows[:, None], False)  # (n, N)
    return weight, kept, positives.any(dim=1)


def _mean_over_blocks(
    projections: tuple[Tensor, Tensor],
    weights: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    size: int,
    *,
    tau: float,
    reweighting: bool,
) -> Tensor:
    """Loss and gradients in one pass, with the `weights` of a block; stores nothing of size block x N."""
    scale, grads = tau / BASE_TEMPERATURE, [torch.zeros_like(z) for z in projections]  # (N, K)
    patches, device = projections[0].shape[0], projections[0].device
    sums = torch.zeros(2, device=device)  # of the losses of blocks, and of blocks that have anchors
    for start in own_groups(torch.arange(0, patches, size)).tolist():  # of the blocks
        rows = torch.arange(start, start + size, device=device)  # (n,)
        weight, kept, anchors = weights(rows)
        coefficient = scale * _coefficients(weight.sum(dim=1).float(), anchors, reweighting)  # (n,)
        sums[1] += anchors.any()
        for z, grad in zip(projections, grads, strict=True):
            block = z.detach()[rows] / tau  # (n, K)
            logits = matmul(block, z.detach().T)  # (n, N)
            loss, slope = weighted_contrastive(logits, weight, kept, coefficient)
            sums[0] += loss / 2
            matmul(slope.T, block, out=grad, beta=1)
            grad.index_add_(0, rows, matmul(slope, z.detach()) / tau)
    total, blocks = all_reduce(sums)
    blocks = blocks.clamp_min(1)  # without any anchor: 0 / 1
    return with_gradient(total / blocks, projections, [grad.div_(2 * blocks) for grad in grads])


def _coefficients(weights: Tensor, anchors: Tensor, reweighting: bool) -> Tensor:
    """r_i / (A * w_i) for each of A anchors, 0 for others, (n,), where `weights` are the row sums w of W."""
    if reweighting:  # w_i cancels
        return anchors / (weights * anchors).sum().clamp_min(1)
    return anchors / (weights.clamp_min(1) * anchors.sum().clamp_min(1))
