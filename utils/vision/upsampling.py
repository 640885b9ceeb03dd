"""Bilinear upsampling (align_corners False) of logits and code in bounded memory.

Upsampling commutes with a 1x1 convolution, so the probes run on the patch grid and only their few channels
are upsampled.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

HELD = {"cpu": 2**22, "cuda": 2**27}  # entries of upsampled logits in memory at a time
LARGEST = 2**26  # an image with more entries is upsampled in strips of rows


def upsampled_argmax(
    logits: Tensor, size: tuple[int, int], extent: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Maximum over K of logits (B, K, h, w) upsampled to (H, W), and its channel, (B, H, W) each.

    `extent` is the (rows, columns) of the source that the result covers; the rest is padding.
    """
    held = HELD.get(logits.device.type, HELD["cpu"])
    per_image = logits.shape[1] * size[0] * size[1]
    if per_image > max(held, LARGEST):
        return _argmax_in_strips(logits, size, extent, held)
    found = [_upsampled(part, size, extent).max(dim=1) for part in logits.split(max(1, held // per_image))]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _argmax_in_strips(
    logits: Tensor, size: tuple[int, int], extent: tuple[float, float] | None, held: int
) -> tuple[Tensor, Tensor]:
    """As `upsampled_argmax`; equal up to rounding. A strip has its rows upsampled first, then its columns."""
    height, width = size
    row_extent, column_extent = extent or logits.shape[2:]
    weights = _axis_weights(logits.shape[2], height, row_extent, device=logits.device)  # (h, H)
    values = logits.new_empty(len(logits), height, width)
    indices = torch.empty_like(values, dtype=torch.int64)
    step = max(1, held // (len(logits) * logits.shape[1] * width))
    for start in range(0, height, step):
        rows = slice(start, start + step)
        strip = torch.einsum("bkhw,hr->bkrw", logits, weights[:, rows])  # (B, K, r, w)
        count = strip.shape[2]
        full = _upsampled(strip, (count, width), (count, column_extent))  # (B, K, r, W)
        values[:, rows], indices[:, rows] = full.max(dim=1)
    return values, indices


def _upsampled(logits: Tensor, size: tuple[int, int], extent: tuple[float, float] | None) -> Tensor:
    """(B, K, h, w) -> (B, K, H, W), channels last: the maximum over a strided axis is slow."""
    if extent is None:
        return F.interpolate(logits.contiguous(memory_format=torch.channels_last), size=size, mode="bilinear")
    # without the padding, rounding may make the result a pixel too small
    padded = F.pad(logits, (0, 1, 0, 1), mode="replicate")
    padded = padded.contiguous(memory_format=torch.channels_last)
    scale = (size[0] / extent[0], size[1] / extent[1])
    return F.interpolate(padded, scale_factor=scale, mode="bilinear")[..., : size[0], : size[1]]


@lru_cache(maxsize=16)  # an upload would wait for the GPU
@torch.inference_mode(False)
def _axis_weights(
    n_in: int, n_out: int, extent: float | None = None, *, device: torch.device | None = None
) -> Tensor:
    """Weights of the source positions in each target position along one axis, (n_in, n_out) float32."""
    identity = torch.eye(n_in)[None]
    if extent is None:
        return F.interpolate(identity, size=n_out, mode="linear")[0].to(device)
    padded = F.pad(identity, (0, 1), mode="replicate")
    return F.interpolate(padded, scale_factor=n_out / extent, mode="linear")[0, :, :n_out].to(device)


def upsampled_norm(code: Tensor, size: tuple[int, int]) -> Tensor:
    """Norm of the upsampled code, (B, D, h, w) float32 -> (B, H, W), at least 1e-12.

    A pixel is a weighted sum of four patches, so its squared norm is a sum of their inner products.
    """
    sides = zip(code.shape[2:], size, strict=True)
    rows, columns = (_axis_weights(n_in, n_out, device=code.device) for n_in, n_out in sides)
    row_pairs, column_pairs = (weight[:-1] * weight[1:] for weight in (rows, columns))  # (n_in - 1, n_out)
    rows, columns = rows.square(), columns.square()  # (n_in, n_out)

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=1)

    right = inner(code[..., :-1], code[..., 1:])  # (B, h, w - 1)
    below = inner(code[:, :, :-1], code[:, :, 1:])  # (B, h - 1, w)
    diagonal = inner(code[:, :, :-1, :-1], code[:, :, 1:, 1:])  # (B, h - 1, w - 1)
    diagonal = diagonal + inner(code[:, :, :-1, 1:], code[:, :, 1:, :-1])
    level = inner(code, code) @ columns + 2 * right @ column_pairs  # (B, h, W)
    across = below @ columns + diagonal @ column_pairs  # (B, h - 1, W)
    square = rows.T @ level + 2 * row_pairs.T @ across  # (B, H, W)
    return square.clamp_min(1e-24).sqrt()
