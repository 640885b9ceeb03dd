"""The segmentation head of STEGO and HP, and its exponential moving average."""

import torch
from torch import Tensor, nn


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


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, *, momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * current, in place, for all parameters."""
    for kept, new in zip(average.parameters(), current.parameters(), strict=True):
        kept.lerp_(new, 1 - momentum)
