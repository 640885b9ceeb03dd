"""The strongest channel of upsampled logits, a strip of rows at a time: a map of any size fits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.vision.upsampling import bilinear_taps

HELD = {"cpu": 2**22, "cuda": 2**26}  # entries of upsampled logits held at a time


def strongest_channel(
    logits: Tensor,
    size: tuple[int, int],
    *,
    extent: tuple[float, float] | None = None,
    held: int | None = None,
) -> Tensor:
    """Channel with the largest of the bilinearly upsampled logits (align_corners False).

    Args:
        logits: (K, h, w) float32, K at most 256.
        size: (H, W).
        extent: the part of the source, from its top left corner, that the map shows, in source positions;
            None is all of it.
        held: entries of upsampled logits held at a time; no result depends on it.

    Returns:
        (H, W) uint8 on the CPU.
    """
    (height, width), device = size, logits.device
    source = logits.permute(1, 2, 0).contiguous()  # (h, w, K): a pixel's channels side by side
    axes = zip(source.shape[:2], size, extent or (None, None), strict=True)
    rows, columns = (_taps(n_in, n_out, part, device) for n_in, n_out, part in axes)
    held = held or HELD.get(device.type, HELD["cpu"])
    at_once = max(1, held // (len(logits) * width))
    found = torch.empty(size, dtype=torch.uint8)
    for start in range(0, height, at_once):
        strip = slice(start, start + at_once)
        tall = _mixed(source, [tap[strip] for tap in rows], axis=0)  # (r, w, K)
        full = _mixed(tall, columns, axis=1)  # (r, W, K)
        found[strip] = full.argmax(dim=2).to("cpu", torch.uint8)
    return found


def _taps(n_in: int, n_out: int, extent: float | None, device: torch.device) -> list[Tensor]:
    """Two positions and the share of the second for each target position, (n_out,) each."""
    taps = bilinear_taps(n_in, n_out, extent=extent)
    return [torch.from_numpy(part).to(device) for part in (taps.low, taps.high, taps.weight)]


def _mixed(source: Tensor, taps: list[Tensor], *, axis: int) -> Tensor:
    low, high, weight = taps
    shape = [-1 if place == axis else 1 for place in range(source.ndim)]
    return torch.lerp(source.index_select(axis, low), source.index_select(axis, high), weight.view(shape))
