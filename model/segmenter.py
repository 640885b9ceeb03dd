"""The network of PPAP: frozen features that define the sets, and a trainable head; see README.md."""

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
        self._wrap = _compiled if compile else lambda function: function
        self.code = self._wrap(self._head_features)  # (B, D, h, w)
        self._frozen: dict[Any, tuple[Callable, Callable]] = {}

    def grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w), the patch grid of a batch of images or labels (..., H, W)."""
        return image.shape[-2] // self.backbone.spec.patch, image.shape[-1] // self.backbone.spec.patch

    def tokens(self, inputs: Tensor) -> Tensor:
        """Tokens of the second-last block, (B, T, D), of uint8 images (B, 3, H, W) or cached tokens."""
        encode, _ = self._frozen_parts()
        return encode(normalise(inputs)) if inputs.dtype == torch.uint8 else inputs.float()

    def features(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Criterion features (B, D, h, w) of the frozen last block, from (B, T, D) tokens."""
        _, last = self._frozen_parts()
        return last(tokens, grid)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> SegmenterOutput:
        """All that training needs, from (B, T, D) tokens of the second-last block."""
        code = self.code(tokens, grid)  # (B, D, h, w)
        rows = code.permute(0, 2, 3, 1).flatten(0, 2)  # (B*h*w, D)
        return SegmenterOutput(code, self.features(tokens, grid), F.normalize(self.projection(rows), dim=1))

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of head and projection: the net's optimizer group, whose gradient is clipped."""
        return [*self.head.parameters(), *self.projection.parameters()]

    def _frozen_parts(self) -> tuple[Callable, Callable]:
        """`tokens` and `last_features` of the backbone, or of its copy in the dtype of autocast."""
        chosen, device, key = self.backbone, self.projection.weight.device, None
        if torch.is_autocast_enabled(device.type) and isinstance(chosen, FrozenViT):
            dtype = torch.get_autocast_dtype(device.type)
            key = device, dtype, chosen.pos_embed._version  # of the loaded weights
        if key not in self._frozen:
            chosen = chosen.cast(dtype) if key else chosen
            self._frozen = {key: (self._wrap(chosen.tokens), self._wrap(chosen.last_features))}
        return self._frozen[key]

    def _head_features(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.backbone.to_map(self.head(tokens), grid)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile; what cannot be compiled runs eagerly, with a warning."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(function, dynamic=False)


def dropout_mask(shape: tuple[int, int], *, probability: float, generator: torch.Generator) -> Tensor:
    """Factors of Dropout2d, (B, D, 1, 1) float32, for this rank's B images of D channels.

    Row b of the draw from the CPU generator belongs to image b of the global batch, so the result does not
    depend on the ranks.
    """
    images, channels = shape
    drawn = torch.rand(world_size() * images, channels, generator=generator)
    return ((own_slice(drawn) >= probability) / (1 - probability))[:, :, None, None]
