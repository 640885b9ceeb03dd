"""Dense CRF refinement (Krähenbühl and Koltun, NIPS 2011) in torch, on any device.

Computes what `utils.vision.crf` computes with pydensecrf, for all heads of an image at once: their labels are
channels of one filter. The iterations do not synchronise with the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.vision.crf import BILATERAL, GAUSSIAN, ITERATIONS, LEAST_PROBABILITY, NEVER, HeadLogits
from utils.vision.lattice import PermutohedralLattice, build_lattice


@torch.no_grad()
def refine(image: Tensor, heads: Sequence[Tensor]) -> list[Tensor]:
    """Mean-field inference on one image for all heads at once.

    Memory: four (H*W, L) maps for L labels in all heads (heads are padded to the widest), two (M, min(L, 64))
    tables and the lattices; M is about 1.2 H*W. 54 labels at 320 x 320 take 0.3 GB, 0.7 GB on pure noise.

    Args:
        image: (H, W, 3) uint8, RGB.
        heads: (K, H, W) float32 logits whose softmax is the unary term, on the image's device.

    Returns:
        The marginals of each head, (K, H, W) float32.
    """
    height, width = image.shape[:2]
    widest = max(len(head) for head in heads)
    prior = torch.stack(
        [F.pad(log_prior(head), (0, 0, 0, 0, 0, widest - len(head)), value=-NEVER) for head in heads]
    )  # (heads, K, H, W)
    prior = prior.flatten(2).permute(2, 0, 1).contiguous()  # (H*W, heads, K): a pixel's labels are adjacent
    smooth, bilateral = smoothness_kernel(height, width, image.device), appearance_kernel(image)
    q = prior.softmax(dim=2)
    for _ in range(ITERATIONS):
        message = smooth.filter(q.flatten(1))  # (H*W, heads * K)
        message += bilateral.filter(q.flatten(1))
        q = message.view_as(prior).add_(prior).softmax(dim=2)
    maps = q.permute(1, 2, 0).unflatten(2, (height, width))  # (heads, K, H, W)
    return [marginals[: len(head)] for marginals, head in zip(maps, heads, strict=True)]


def log_prior(logits: Tensor) -> Tensor:
    """Log of the softmax over the first axis, probabilities clipped at 1e-5."""
    return logits.softmax(dim=0).clamp_(LEAST_PROBABILITY, 1).log_()


@lru_cache(maxsize=1)
def smoothness_kernel(height: int, width: int, device: torch.device) -> PermutohedralLattice:
    """Gaussian in the position; the same for all images of a size."""
    return build_lattice(_positions(height, width, GAUSSIAN["sxy"], device)).normalised(GAUSSIAN["compat"])


def appearance_kernel(image: Tensor) -> PermutohedralLattice:
    """Gaussian in position and colour of an image (H, W, 3)."""
    position = _positions(*image.shape[:2], BILATERAL["sxy"], image.device)
    colour = _divided(image.flip(2).flatten(0, 1).float(), BILATERAL["srgb"])  # (H*W, 3), BGR
    return build_lattice(torch.cat((position, colour), dim=1)).normalised(BILATERAL["compat"])


def _positions(height: int, width: int, deviation: float, device: torch.device) -> Tensor:
    """(H*W, 2), x before y."""
    y, x = (torch.arange(side, dtype=torch.float32, device=device) for side in (height, width))
    grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=2)  # (H, W, 2)
    return _divided(grid.flatten(0, 1), deviation)


def _divided(features: Tensor, deviation: float) -> Tensor:
    # CUDA multiplies by the reciprocal of a Python number, which rounds differently
    return features / features.new_full((1,), deviation)


class MeanField:
    """Refines images on their device when they are submitted; has the interface of `CrfPool`."""

    on_device = True

    def __init__(self) -> None:
        self._done: deque[tuple[Any, list[Tensor]]] = deque()

    def submit(self, image: Tensor, heads: Sequence[HeadLogits], tag: Any) -> None:
        """Refines one image (H, W, 3) uint8; the result is returned with the tag."""
        full = []
        for head in heads:
            logits = F.interpolate(head.logits[None], size=image.shape[:2], mode="bilinear")[0]  # (K, H, W)
            full.append(logits if head.divisor is None else logits / head.divisor)
        self._done.append((tag, [marginals.argmax(dim=0) for marginals in refine(image, full)]))

    def finished(self, *, wait_for_one: bool = False) -> Iterator[tuple[Any, list[Tensor]]]:
        """Yields (tag, predictions (H, W) int64 per head) of all submitted images."""
        while self._done:
            yield self._done.popleft()

    def __len__(self) -> int:
        return len(self._done)
