"""The network of PPAP: frozen features that define the sets, and a trainable head.

image (B, 3, H, W) -> FrozenViT blocks 1..L-1 -> tokens --> block L (frozen)  -> norm -> crit (B, D, h, w)
                                                   \\-> head (trainable) -> norm -> code (B, D, h, w)
                                                        code -> Linear -> L2 normalise -> z (B*h*w, D)
The loss selects its sets by crit and is differentiated through z; the probes read code.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backbone import FrozenViT
from utils.training.distributed import own_slice, world_size
from utils.vision.transforms import normalise


class SegmenterOutput(NamedTuple):
    """Output for a batch of images."""

    code: Tensor  # head output after the final LayerNorm, (B, D, h, w)
    crit: Tensor  # criterion features without dropout, (B, D, h, w), no gradient
    z: Tensor  # normalised projections, (B*h*w, D), rows in (image, row, column) order


class Segmenter(nn.Module):
    """Frozen backbone, trainable head (a copy of its last block, weights included) and projection.

    `compile` applies torch.compile to backbone and head.
    """

    def __init__(self, backbone: FrozenViT, *, compile: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = copy.deepcopy(backbone.blocks[-1]).requires_grad_(True)
        self.projection = nn.Linear(backbone.spec.dim, backbone.spec.dim)
        wrap = _compiled if compile else lambda function: function
        self._encode, self.features = wrap(backbone.tokens), wrap(backbone.last_features)
        self.code = wrap(self._head_features)  # (B, D, h, w)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w), the patch grid of a batch of images or labels (..., H, W)."""
        return image.shape[-2] // self.backbone.spec.patch, image.shape[-1] // self.backbone.spec.patch

    def tokens(self, inputs: Tensor) -> Tensor:
        """Tokens of the second-last block, (B, T, D), of uint8 images (B, 3, H, W) or cached tokens."""
        return self._encode(normalise(inputs)) if inputs.dtype == torch.uint8 else inputs.float()

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> SegmenterOutput:
        """All that training needs, from (B, T, D) tokens of the second-last block."""
        code = self.code(tokens, grid)  # (B, D, h, w)
        rows = code.permute(0, 2, 3, 1).flatten(0, 2)  # (B*h*w, D)
        return SegmenterOutput(code, self.features(tokens, grid), F.normalize(self.projection(rows), dim=1))

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of head and projection: the net's optimizer group, whose gradient is clipped."""
        return [*self.head.parameters(), *self.projection.parameters()]

    def _head_features(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.backbone.to_map(self.head(tokens), grid)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile; what cannot be compiled runs eagerly, with a warning."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(function, dynamic=False)


def criterion_dropout(crit: Tensor, *, probability: float, generator: torch.Generator) -> Tensor:
    """Dropout2d of this rank's images (B, D, h, w) with masks from a CPU generator.

    Row b of the draw belongs to image b of the global batch, so the result does not depend on the ranks.
    """
    if probability == 0:
        return crit
    images, channels = crit.shape[:2]
    drawn = torch.rand(world_size() * images, channels, generator=generator)
    mask = (own_slice(drawn) >= probability) / (1 - probability)  # (B, D)
    return crit * mask.to(crit, non_blocking=True)[:, :, None, None]
