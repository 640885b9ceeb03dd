"""The networks: frozen features that define the loss, and a trainable head; see README.md."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backbone import Backbone
from utils.training.distributed import own_slice, world_size
from utils.vision.transforms import normalise


class Segmenter(nn.Module):
    """A frozen backbone and a trainable part that makes the code of its tokens.

    Args:
        backbone: gives tokens and criterion features.
        code_dim: channels of the code.
        compile: whether to apply torch.compile to backbone and head.
    """

    def __init__(self, backbone: Backbone, *, code_dim: int, compile: bool) -> None:
        super().__init__()
        self.backbone, self.code_dim = backbone, code_dim
        self._wrap = _compiled if compile else lambda function: function
        self.code = self._wrap(self._code)  # tokens (B, T, D) and grid -> (B, code_dim, h, w)
        self._frozen: dict[Any, tuple[Callable, Callable]] = {}

    def grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w), the patch grid of a batch of images or labels (..., H, W)."""
        return image.shape[-2] // self.backbone.spec.patch, image.shape[-1] // self.backbone.spec.patch

    def tokens(self, inputs: Tensor) -> Tensor:
        """Tokens of the second-last block, (B, T, D), of uint8 images (B, 3, H, W) or cached tokens."""
        return self.encode(normalise(inputs)) if inputs.dtype == torch.uint8 else inputs.float()

    def encode(self, image: Tensor) -> Tensor:
        """Tokens (B, T, D) of normalised images (B, 3, H, W)."""
        encode, _ = self._frozen_parts()
        return encode(image)

    def code_of(self, inputs: Tensor, grid: tuple[int, int], *, flip: bool = False) -> Tensor:
        """The code (B, K, h, w) of images or tokens; with `flip`, its mean with that of the mirror images."""
        code = self.code(self.tokens(inputs), grid)
        return (code + self.code(self.tokens(inputs.flip(-1)), grid).flip(-1)) / 2 if flip else code

    def features(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Criterion features (B, D, h, w) of the frozen last block, from (B, T, D) tokens."""
        _, last = self._frozen_parts()
        return last(tokens, grid)

    def trainable(self) -> list[nn.Parameter]:
        """The net's optimizer group, whose gradient is clipped."""
        return [value for name, value in self.named_parameters() if not name.startswith("backbone.")]

    def _code(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        raise NotImplementedError

    def _frozen_parts(self) -> tuple[Callable, Callable]:
        """`tokens` and `last_features` of the backbone, or of its copy in the dtype of autocast."""
        chosen, key = self.backbone, None
        weight = next(chosen.parameters())
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
            key = weight.device, dtype, weight._version  # of the loaded weights
        if key not in self._frozen:
            chosen = chosen.cast(dtype) if key else chosen
            self._frozen = {key: (self._wrap(chosen.tokens), self._wrap(chosen.last_features))}
        return self._frozen[key]


class BlockSegmenter(Segmenter):
    """PPAP's network: a head that copies the backbone's last block, weights included, and a projection.

    Its code always has the backbone's width.
    """

    def __init__(self, backbone: Backbone, code_dim: int | None = None, *, compile: bool = False) -> None:
        super().__init__(backbone, code_dim=backbone.spec.dim, compile=compile)
        self.head = copy.deepcopy(backbone.blocks[-1]).requires_grad_(True)
        self.projection = nn.Linear(backbone.spec.dim, backbone.spec.dim)

    def project(self, code: Tensor) -> Tensor:
        """Unit-length projections (B*h*w, D) of a code (B, D, h, w), in (image, row, column) order."""
        return F.normalize(self.projection(code.permute(0, 2, 3, 1).flatten(0, 2)), dim=1)

    def _code(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.backbone.to_map(self.backbone.apply_block(self.head, tokens, grid), grid)


class TwoBranchHead(nn.Module):
    """Sum of a linear and a nonlinear branch of 1x1 convolutions, from D channels to a code of K channels."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(dim, channels, 1)
        self.nonlinear = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, channels, 1))

    def forward(self, features: Tensor, masks: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The code (B, K, h, w) of features (B, D, h, w).

        `masks` are the channel dropout factors of the two branches, (B, D, 1, 1) each; None drops nothing.
        """
        first, second = (features, features) if masks is None else (features * mask for mask in masks)
        return self.linear(first) + self.nonlinear(second)


class BranchSegmenter(Segmenter):
    """STEGO's and HP's network: a two-branch head reads the criterion features; the code has K channels."""

    def __init__(self, backbone: Backbone, code_dim: int, *, compile: bool = False) -> None:
        super().__init__(backbone, code_dim=code_dim, compile=compile)
        self.head = TwoBranchHead(backbone.spec.dim, code_dim)

    def _code(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.head(self.features(tokens, grid))


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
