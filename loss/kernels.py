"""The fused loss's kernels: matrix products whose entries are consumed where they are made.

The idea is FlashAttention's (Dao et al., NeurIPS 2022): a program holds a block of rows, streams tiles of
the other matrix past it, and what leaves it is small: a bit a pair, a sum or a maximum a row. Sums over
patches are cut into spans of fixed length, one program each, whose parts torch adds up: enough programs to
fill a GPU, no float atomics, and the same bits in every run.

Sides of Triton's tensors are powers of two. A, N and D are any: what lies beyond is masked, and a bit mask
has W = ceil(N / 32) words a row, zero beyond N.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def products(
    left, right, rows, columns, height, width, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    """left[rows] @ right[columns].T of (height, D) and (width, D), as a float32 tile; 0 beyond them."""
    tile = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)  # (R, C)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        left_at = left + rows.to(tl.int64)[:, None] * D + d[None, :]  # (R, BLOCK_D)
        right_at = right + columns.to(tl.int64)[None, :] * D + d[:, None]  # (BLOCK_D, C)
        a = tl.load(left_at, mask=(rows < height)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(right_at, mask=(columns < width)[None, :] & (d < D)[:, None], other=0.0)
        tile = tl.dot(a, b, tile, input_precision=PRECISION)
    return tile


@triton.jit
def pack(flags, words, rows, first, height, W, BLOCK_N: tl.constexpr):
    """Writes flags (R, BLOCK_N) bool, of columns from `first` on, as bits of words (height, W) int32."""
    lanes = tl.arange(0, 32)[None, None, :]
    bits = tl.reshape(flags.to(tl.int32), (flags.shape[0], BLOCK_N // 32, 32)) << lanes
    packed = tl.sum(bits, axis=2)  # (R, BLOCK_N / 32), each bit once: the sum is their union
    word = first // 32 + tl.arange(0, BLOCK_N // 32)
    at = words + rows.to(tl.int64)[:, None] * W + word[None, :]
    tl.store(at, packed, mask=(rows < height)[:, None] & (word < W)[None, :])


@triton.jit
def unpack(words, rows, first, height, W, BLOCK_N: tl.constexpr):
    """The bits that `pack` wrote of the columns from `first` on, (R, BLOCK_N) int32, 0 beyond N."""
    word = first // 32 + tl.arange(0, BLOCK_N // 32)
    at = words + rows.to(tl.int64)[:, None] * W + word[None, :]
    packed = tl.load(at, mask=(rows < height)[:, None] & (word < W)[None, :], other=0)  # (R, BLOCK_N / 32)
    bits = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1  # (R, BLOCK_N / 32, 32)
    return tl.reshape(bits, (rows.shape[0], BLOCK_N))


@triton.jit
def threshold_kernel(
    proxies,
    bank,
    phi,
    psi,
    above,
    below,
    A,
    N,
    W,
    D: tl.constexpr,
    WITH_BELOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of {v . f > phi}, and of {v . f < psi}, to bits; grid (A tiles, N tiles)."""
    rows = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    first = tl.program_id(1) * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    similarity = products(proxies, bank, rows, columns, A, N, D, BLOCK_D, PRECISION)  # (BLOCK_A, BLOCK_N)
    present = (columns < N)[None, :]
    upper = tl.load(phi + rows, mask=rows < A, other=0.0)[:, None]
    pack((similarity > upper) & present, above, rows, first, A, W, BLOCK_N)
    if WITH_BELOW:
        lower = tl.load(psi + rows, mask=rows < A, other=0.0)[:, None]
        pack((similarity < lower) & present, below, rows, first, A, W, BLOCK_N)


@triton.jit
def gather_kernel(
    words,
    high,
    low,
    totals,
    sizes,
    A,
    N,
    W,
    length,
    D: tl.constexpr,
    WITH_LOW: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of a span's rows over the bits set, and their count; grid (A tiles, D tiles, spans)."""
    rows = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    span = tl.program_id(2)
    total = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)
    size = tl.zeros((BLOCK_A,), tl.int32)
    for first in range(span * length, tl.minimum((span + 1) * length, N), BLOCK_N):
        bits = unpack(words, rows, first, A, W, BLOCK_N)  # (BLOCK_A, BLOCK_N)
        size += tl.sum(bits, axis=1)
        columns = first + tl.arange(0, BLOCK_N)
        at = columns.to(tl.int64)[:, None] * D + d[None, :]  # (BLOCK_N, BLOCK_D)
        inside = (columns < N)[:, None] & (d < D)[None, :]
        member = bits.to(tl.float16)
        upper = tl.load(high + at, mask=inside, other=0.0)
        if WITH_LOW:
            # Tensor cores cut where they add instead of rounding: each tile gets a sum of its own, small
            # parts first, and the long sum over tiles is a rounded one.
            lower = tl.load(low + at, mask=inside, other=0.0)
            total += tl.dot(member, upper, tl.dot(member, lower))
        else:
            total += tl.dot(member, upper)
    out = (span * A + rows).to(tl.int64)
    tl.store(totals + out[:, None] * D + d[None, :], total, mask=(rows < A)[:, None] & (d < D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(sizes + out, size, mask=rows < A)


@triton.jit
def contrast_kernel(
    anchors,
    z,
    index,
    above,
    below,
    sums,
    counts,
    A,
    N,
    W,
    length,
    spans,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Running log-sum-exp over P and Q, sum of logits over P, counts; grid (A tiles, spans)."""
    rows = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    span = tl.program_id(1)
    own = tl.load(index + rows, mask=rows < A, other=-1)[:, None]
    peak = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_A,), tl.float32)
    positive = tl.zeros((BLOCK_A,), tl.float32)
    count = tl.zeros((BLOCK_A,), tl.int32)
    under = tl.zeros((BLOCK_A,), tl.int32)
    for first in range(span * length, tl.minimum((span + 1) * length, N), BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        logits = products(anchors, z, rows, columns, A, N, D, BLOCK_D, PRECISION)  # (BLOCK_A, BLOCK_N)
        other = columns[None, :] != own  # an anchor is neither its own positive nor negative
        lower = unpack(below, rows, first, A, W, BLOCK_N)
        member = (unpack(above, rows, first, A, W, BLOCK_N) != 0) & other
        kept = member | ((lower != 0) & other)
        under += tl.sum(lower, axis=1)
        count += tl.sum(member.to(tl.int32), axis=1)
        positive += tl.sum(tl.where(member, logits, 0.0), axis=1)
        logits = tl.where(kept, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing kept so far
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        peak = higher
    out = span * A + rows
    step = spans * A
    tl.store(sums + out, peak, mask=rows < A)
    tl.store(sums + step + out, total, mask=rows < A)
    tl.store(sums + 2 * step + out, positive, mask=rows < A)
    tl.store(counts + out, count, mask=rows < A)
    tl.store(counts + step + out, under, mask=rows < A)


@triton.jit
def add_product(slope, streamed, columns, width, d, total, D: tl.constexpr, PRECISION: tl.constexpr):
    """total + slope @ streamed[columns, d]."""
    at = streamed + columns.to(tl.int64)[:, None] * D + d[None, :]
    values = tl.load(at, mask=(columns < width)[:, None] & (d < D)[None, :], other=0.0)
    return tl.dot(slope, values, total, input_precision=PRECISION)


@triton.jit
def store_part(out, rows, height, d, total, D: tl.constexpr):
    """out[rows, d] = total."""
    at = out + rows.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, total, mask=(rows < height)[:, None] & (d < D)[None, :])


@triton.jit
def gradient_kernel(
    anchors,
    z,
    index,
    above,
    below,
    log_total,
    factor,
    share,
    out,
    A,
    N,
    W,
    length,
    D: tl.constexpr,
    OF_PATCHES: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Gradient of a block of anchors over a span of patches, or of a block of patches over a span of anchors.

    slope_ij = factor_i * exp(logit_ij - log_total_i) on P and Q, less share_i on P. Grid (blocks, parts of D,
    spans). A program recomputes the logits, so it should see all of D: PARTS accumulators of BLOCK_OUT
    columns, since 384 and 768 are three powers of two and 512 columns would waste a quarter.
    """
    span = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * PARTS * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    own, streamed, height, width = anchors, z, A, N
    if OF_PATCHES:
        own, streamed, height, width = z, anchors, N, A
    total0 = tl.zeros((BLOCK_R, BLOCK_OUT), tl.float32)
    total1 = tl.zeros((BLOCK_R, BLOCK_OUT), tl.float32)
    total2 = tl.zeros((BLOCK_R, BLOCK_OUT), tl.float32)
    for first in range(span * length, tl.minimum((span + 1) * length, width), BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        logits = products(own, streamed, rows, columns, height, width, D, BLOCK_D, PRECISION)  # (R, C)
        if OF_PATCHES:
            who = columns  # the anchors, in the tile's second axis
            member = tl.trans(unpack(above, who, tl.program_id(0) * BLOCK_R, A, W, BLOCK_R)) != 0
            lower = tl.trans(unpack(below, who, tl.program_id(0) * BLOCK_R, A, W, BLOCK_R)) != 0
            other = rows[:, None] != tl.load(index + who, mask=who < A, other=-1)[None, :]
        else:
            who = rows
            member = unpack(above, who, first, A, W, BLOCK_C) != 0
            lower = unpack(below, who, first, A, W, BLOCK_C) != 0
            other = columns[None, :] != tl.load(index + who, mask=who < A, other=-1)[:, None]
        axis: tl.constexpr = 0 if OF_PATCHES else 1
        level = tl.expand_dims(tl.load(log_total + who, mask=who < A, other=0.0), axis)
        scale = tl.expand_dims(tl.load(factor + who, mask=who < A, other=0.0), axis)
        less = tl.expand_dims(tl.load(share + who, mask=who < A, other=0.0), axis)
        member = member & other
        kept = member | (lower & other)
        # what is left out may lie far above log_total: exp of it is never formed
        slope = tl.exp(tl.where(kept, logits - level, float("-inf"))) * scale - tl.where(member, less, 0.0)
        total0 = add_product(slope, streamed, columns, width, d, total0, D, PRECISION)
        if PARTS > 1:
            total1 = add_product(slope, streamed, columns, width, d + BLOCK_OUT, total1, D, PRECISION)
        if PARTS > 2:
            total2 = add_product(slope, streamed, columns, width, d + 2 * BLOCK_OUT, total2, D, PRECISION)
    part = out + span.to(tl.int64) * height * D
    store_part(part, rows, height, d, total0, D)
    if PARTS > 1:
        store_part(part, rows, height, d + BLOCK_OUT, total1, D)
    if PARTS > 2:
        store_part(part, rows, height, d + 2 * BLOCK_OUT, total2, D)
