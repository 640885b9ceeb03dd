"""Bilinear upsampling (align_corners False) of logits and code in bounded memory.

Upsampling commutes with a 1x1 convolution, so the probes run on the patch grid and only their few channels
are upsampled.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

HELD = {"cpu": 2**22, "cuda": 2**27}  # entries of upsampled logits in memory at a time
LARGEST = 2**26  # an image with more entries is upsampled channel by channel


def upsampled_argmax(
    logits: Tensor, size: tuple[int, int], extent: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Maximum over K of logits (B, K, h, w) upsampled to (H, W), and its channel, (B, H, W) each.

    `extent` is the (rows, columns) of the source that the result covers; the rest is padding.
    """
    held = HELD.get(logits.device.type, HELD["cpu"])
    per_image = logits.shape[1] * size[0] * size[1]
    if per_image > max(held, LARGEST):
        return _argmax_by_channel(logits, size, extent)
    found = [_upsampled(part, size, extent).max(dim=1) for part in logits.split(max(1, held // per_image))]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _argmax_by_channel(
    logits: Tensor, size: tuple[int, int], extent: tuple[float, float] | None
) -> tuple[Tensor, Tensor]:
    """As `upsampled_argmax`, with one channel in memory at a time."""
    values = logits.new_full((len(logits), *size), -torch.inf)  # (B, H, W)
    indices = torch.zeros_like(values, dtype=torch.int64)
    for channel in range(logits.shape[1]):
        found = _upsampled(logits[:, channel : channel + 1], size, extent)[:, 0]  # (B, H, W)
        indices.masked_fill_(found > values, channel)
        torch.maximum(values, found, out=values)
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
def _axis_weights(n_in: int, n_out: int, device: torch.device) -> Tensor:
    """Weights of the source positions in each target position along one axis, (n_in, n_out) float32."""
    return F.interpolate(torch.eye(n_in)[None], size=n_out, mode="linear")[0].to(device)


def upsampled_norm(code: Tensor, size: tuple[int, int]) -> Tensor:
    """Norm of the upsampled code, (B, D, h, w) float32 -> (B, H, W), at least 1e-12.

    A pixel is a weighted sum of four patches, so its squared norm is a sum of their inner products.
    """
    sides = zip(code.shape[2:], size, strict=True)
    rows, columns = (_axis_weights(n_in, n_out, code.device) for n_in, n_out in sides)
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
