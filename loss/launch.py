"""Launchers of the fused loss's kernels: tensors in, tensors out, the spans' parts added up.

Offsets are 64 bit; A, N and D are any size. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from loss import kernels

# Tile sizes found by compiling for sm_80 and sm_90 at D = 384 and 768: the largest that spill no registers.
THRESHOLD = {"BLOCK_A": 128, "BLOCK_N": 128, "BLOCK_D": 16, "num_warps": 8}
GATHER = {"BLOCK_A": 128, "BLOCK_N": 64, "BLOCK_D": 128, "num_warps": 8}
CONTRAST = {"BLOCK_A": 64, "BLOCK_N": 128, "BLOCK_D": 16, "num_warps": 8}
GRADIENT = {"BLOCK_R": 32, "BLOCK_C": 32, "BLOCK_D": 16, "BLOCK_OUT": 128, "num_warps": 8}
SPAN, MOST_SPANS = 2048, 32  # patches that a program sums over at least, and parts that a sum has at most
SCALE = 2.0**12  # of a bank held in float16 pairs: unit rows stay below float16's 65504
INTERPRETED = not isinstance(kernels.threshold_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: on the CPU


@dataclass(frozen=True)
class Bank:
    """The patches' features as the kernels read them.

    A row is (high + low) / scale. At scale 2^12 the rest is at most 2^-22 of an entry (2^-37 where that is
    less than float16 can tell), so a proxy's error is at most 2^-22 / |mean| and no similarity moves by more
    than 2.4e-7 / |mean|, |mean| being the length of the mean of unit rows: about Phi_0 or more. A 0/1 mask is
    exact in float16, the sums are float32: tensor cores do what float32 products would.

    Attributes:
        rows: f_j, (N, D) float32 or float16: the operand of the similarities.
        high: scale * f_j rounded to float16, (N, D).
        low: what that leaves, rounded to float16, (N, D); None where high is exact.
        scale: a power of two.
    """

    rows: Tensor
    high: Tensor
    low: Tensor | None
    scale: float


@dataclass(frozen=True)
class Sets:
    """P and the patches below Psi as bits, the anchor itself among them.

    Attributes:
        above: {v . f_j > Phi}, (A, W) int32, W = ceil(N / 32); bit k of word w is patch 32 w + k.
        below: {v . f_j < Psi}, the same; `above` again where it was not asked for.
    """

    above: Tensor
    below: Tensor


@dataclass(frozen=True)
class Gathered:
    """Sum of f_j over a set, total (A, D) float32, and its size (A, 1) float32."""

    total: Tensor
    size: Tensor


@dataclass(frozen=True)
class Contrast:
    """The contrastive term's sums over an anchor's patches, without the anchor itself.

    Attributes:
        log_total: log-sum-exp of the logits over P and Q, (A,) float32; -inf where both are empty.
        positive: sum of the logits over P, (A,) float32.
        count: |P|, (A,) int64.
        below: |{v . f_j < Psi}|, (A,) int64, the anchor included.
    """

    log_total: Tensor
    positive: Tensor
    count: Tensor
    below: Tensor


def split_bank(bank: Tensor, operand: torch.dtype) -> Bank:
    """The bank (N, D) float32, of unit length or zero, as the kernels read it."""
    bank = bank.contiguous()  # of a single image it is a transposed view, and so would be what is made of it
    if operand == torch.float16:
        rows = bank.half()
        return Bank(rows, rows, None, 1.0)
    scaled = bank * SCALE
    high = scaled.half()
    return Bank(bank, high, (scaled - high.float()).half(), SCALE)


def threshold(
    proxies: Tensor, bank: Bank, *, phi: Tensor, psi: Tensor | None = None, precision: str = "ieee"
) -> Sets:
    """The sets of the proxies (A, D) float32 at boundaries (A, 1); float16 operands where the bank's are."""
    (count, dim), patches = proxies.shape, len(bank.rows)
    words = -(-patches // 32)
    above = torch.empty(count, words, dtype=torch.int32, device=proxies.device)  # (A, W)
    below = above if psi is None else torch.empty_like(above)
    grid = (_blocks(count, THRESHOLD["BLOCK_A"]), _blocks(patches, THRESHOLD["BLOCK_N"]))
    kernels.threshold_kernel[grid](
        proxies.to(bank.rows.dtype).contiguous(),
        bank.rows,
        phi.contiguous(),
        phi if psi is None else psi.contiguous(),
        above,
        below,
        count,
        patches,
        words,
        D=dim,
        WITH_BELOW=psi is not None,
        PRECISION=precision,
        **THRESHOLD,
    )
    return Sets(above, below)


def gather(words: Tensor, bank: Bank) -> Gathered:
    """Sum of the bank's rows over the bits set in words (A, W) int32."""
    count, (patches, dim) = len(words), bank.rows.shape
    span = _span(patches)
    spans = _blocks(patches, span)
    totals = torch.empty(spans, count, dim, device=words.device)  # (S, A, D)
    sizes = torch.empty(spans, count, dtype=torch.int32, device=words.device)  # (S, A)
    grid = (_blocks(count, GATHER["BLOCK_A"]), _blocks(dim, GATHER["BLOCK_D"]), spans)
    kernels.gather_kernel[grid](
        words,
        bank.high,
        bank.high if bank.low is None else bank.low,
        totals,
        sizes,
        count,
        patches,
        words.shape[1],
        span,
        D=dim,
        WITH_LOW=bank.low is not None,
        **GATHER,
    )
    return Gathered(totals.sum(dim=0) / bank.scale, sizes.sum(dim=0)[:, None].float())


def contrast(z: Tensor, index: Tensor, sets: Sets, *, tau: float, precision: str = "ieee") -> Contrast:
    """The sums of the anchors at `index` (A,) against z (N, D')."""
    count, (patches, dim) = len(index), z.shape
    span = _span(patches)
    spans = _blocks(patches, span)
    sums = torch.empty(3, spans, count, device=z.device)  # peak, total above it, logits over P
    counts = torch.empty(2, spans, count, dtype=torch.int32, device=z.device)  # |P|, below
    kernels.contrast_kernel[(_blocks(count, CONTRAST["BLOCK_A"]), spans)](
        z[index] / tau,
        z,
        index,
        sets.above,
        sets.below,
        sums,
        counts,
        count,
        patches,
        sets.above.shape[1],
        span,
        spans,
        D=dim,
        PRECISION=precision,
        **CONTRAST,
    )
    log_total = (sums[0] + sums[1].log()).logsumexp(dim=0)  # (A,)
    return Contrast(log_total, sums[2].sum(dim=0), *counts.sum(dim=1).unbind())


def gradient(
    z: Tensor,
    index: Tensor,
    sets: Sets,
    *,
    log_total: Tensor,
    factor: Tensor,
    share: Tensor,
    tau: float,
    precision: str = "ieee",
) -> Tensor:
    """Gradient in z (N, D') where the slope of logit_ij = z_i . z_j / tau of the anchors at `index` (A,) is
    factor_i * exp(logit_ij - log_total_i) over P and Q, less share_i over P; all (A,) float32.
    """
    (patches, dim), count = z.shape, len(index)
    blocks = _blocks(dim, GRADIENT["BLOCK_OUT"])
    passes = _blocks(blocks, 3)  # a program has three accumulators
    rows = z[index] / tau  # (A, D'), a logit is rows_i . z_j

    def launch(out: Tensor, height: int, *, of_patches: bool, span: int) -> Tensor:
        kernels.gradient_kernel[(_blocks(height, GRADIENT["BLOCK_R"]), passes, len(out))](
            rows,
            z,
            index,
            sets.above,
            sets.below,
            log_total,
            factor,
            share,
            out,
            count,
            patches,
            sets.above.shape[1],
            span,
            D=dim,
            OF_PATCHES=of_patches,
            PARTS=_blocks(blocks, passes),
            PRECISION=precision,
            **GRADIENT,
        )
        return out.sum(dim=0) if len(out) > 1 else out[0]

    of_patches = launch(z.new_empty(1, patches, dim), patches, of_patches=True, span=count)  # (N, D')
    span = _span(patches)
    parts = z.new_empty(_blocks(patches, span), count, dim)  # (S, A, D')
    of_anchors = launch(parts, count, of_patches=False, span=span) / tau  # (A, D')
    return of_patches.index_add_(0, index, of_anchors)


def _span(patches: int) -> int:
    """Patches a program sums over: of N alone, so that no sum depends on the device; a multiple of tiles."""
    return max(SPAN, 128 * _blocks(patches, 128 * MOST_SPANS))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
