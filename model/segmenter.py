"""The network of PPAP: frozen features to learn from, and a head that learns.

image (B, 3, H, W) -> FrozenViT blocks 1..L-1 -> tokens --> block L (frozen) -> norm -> crit (B, D, h, w)
                                                   \\-> head (trainable)  -> norm -> code (B, D, h, w)
                                                        code -> Linear -> L2 normalise -> z (B*h*w, D)
crit says which patches belong together (loss), z is pulled and pushed, code is what the probes read.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backbone import FrozenViT
from utils.training.distributed import own_slice, world_size


@dataclass(frozen=True)
class SegmenterOutput:
    """What one batch of images gives.

    Attributes:
        code: head output after the final LayerNorm, (B, D, h, w).
        crit: criterion features without dropout, (B, D, h, w), no gradient.
        z: normalised projections, (B*h*w, D), rows in (image, row, column) order.
    """

    code: Tensor
    crit: Tensor
    z: Tensor


class Segmenter(nn.Module):
    """Frozen backbone, trainable head (a deep copy of the last block) and projection.

    Args:
        backbone: the frozen ViT; its weights must be in place, since the head is copied from them.
    """

    def __init__(self, backbone: FrozenViT) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = copy.deepcopy(backbone.blocks[-1]).requires_grad_(True)
        self.projection = nn.Linear(backbone.spec.dim, backbone.spec.dim)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w), the patch grid of an image batch."""
        return image.shape[-2] // self.backbone.spec.patch, image.shape[-1] // self.backbone.spec.patch

    def forward(self, image: Tensor) -> SegmenterOutput:
        """All that training needs, from (B, 3, H, W) normalised images."""
        return self.from_tokens(self.backbone.tokens(image), self.grid(image))

    def from_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> SegmenterOutput:
        """The same from what the second-last block gives, (B, 1 + R + h*w, D)."""
        code = self.code(tokens, grid)  # (B, D, h, w)
        return SegmenterOutput(code, self.backbone.last_features(tokens, grid), self.project(code))

    def code(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The code alone, (B, D, h, w): what evaluation and the frozen baseline need."""
        return self.backbone.to_map(self.head(tokens), grid)

    def project(self, code: Tensor) -> Tensor:
        """(B, D, h, w) -> z, (B*h*w, D), unit length."""
        rows = code.permute(0, 2, 3, 1).flatten(0, 2)  # (B*h*w, D)
        return F.normalize(self.projection(rows), dim=1)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters of head and projection: the net's optimizer group, and what clipping acts on."""
        return [*self.head.parameters(), *self.projection.parameters()]


def criterion_dropout(crit: Tensor, *, probability: float, generator: torch.Generator) -> Tensor:
    """Zeroes whole channels of an image, as Dropout2d does, with masks from an explicit CPU generator.

    Args:
        crit: (B, D, h, w), this rank's slice of the global batch.
        probability: share of channels zeroed; the others are scaled by 1 / (1 - probability).
        generator: made afresh for the step; row b of its draw belongs to image b of the global batch.
    """
    if probability == 0:
        return crit
    images, channels = crit.shape[:2]
    drawn = torch.rand(world_size() * images, channels, generator=generator)  # of the global batch
    kept = own_slice(drawn) >= probability  # (B, D)
    mask = (kept / (1 - probability)).to(crit, non_blocking=True)
    return crit * mask[:, :, None, None]
