"""The images of a split that are shown, always the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def shown_places(count: int, images: int) -> list[int]:
    """`count` places in a split of so many images, spread over it; all where it has fewer."""
    count = min(count, images)
    return [place * images // count for place in range(count)]


@dataclass(frozen=True)
class ShownImages:
    """Images of a split.

    Attributes:
        places: where they are in it, ascending, P of them.
        images: (P, 3, H, W) uint8.
        names: P files, or what stands for them.
    """

    places: tuple[int, ...]
    images: Tensor
    names: tuple[str, ...]

    @classmethod
    def of(cls, items: Any, count: int) -> ShownImages | None:
        """Those at `shown_places` of a data set whose items have an `image` (3, H, W); None without any."""
        places = shown_places(count, len(items))
        if not places:
            return None
        images = torch.stack([items[place].image for place in places])  # (P, 3, H, W)
        return cls(tuple(places), images, tuple(items.source.name(place) for place in places))
