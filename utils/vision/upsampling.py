"""Bilinear upsampling (align_corners False) as taps, in NumPy: shared by the evaluator and the CRF workers.

A 1x1 convolution commutes with it, so probes are applied on the patch grid and only their few channels
are upsampled; the norm that cosines of the *upsampled* code need comes from inner products of neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Taps:
    """The two source positions of each target position.

    Attributes:
        low: (n_out,) int64.
        high: (n_out,) int64; low + 1, or low at the border.
        weight: (n_out,) float32, the share of `high`.
    """

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray


def bilinear_taps(n_in: int, n_out: int, *, extent: float | None = None) -> Taps:
    """Taps along one axis, with the coordinate rule of torch's interpolate.

    Args:
        n_in: number of source positions.
        n_out: number of target positions.
        extent: how many source positions, from the first, the targets lie over; what is beyond was padding.
            None is all of them.
    """
    step = np.float32((n_in if extent is None else extent) / n_out)
    source = (np.arange(n_out, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
    source = source.clip(min=0)
    low = np.minimum(source.astype(np.int64), n_in - 1)
    return Taps(low, np.minimum(low + 1, n_in - 1), source - low.astype(np.float32))


def upsample(channels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(C, h, w) float32 -> (C, H, W) float32."""
    rows, columns = bilinear_taps(channels.shape[1], size[0]), bilinear_taps(channels.shape[2], size[1])
    weight = rows.weight[:, None]
    tall = channels[:, rows.low] * (1 - weight) + channels[:, rows.high] * weight  # (C, H, w)
    return tall[:, :, columns.low] * (1 - columns.weight) + tall[:, :, columns.high] * columns.weight
