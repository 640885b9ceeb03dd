"""Overlapping tiles for images that the network cannot take whole, blended on the patch grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST_PATCHES = 4  # of a tile's side: a quarter of it is one


def tile_mistake(tile: int, patch: int) -> str | None:
    """Why tiles cannot have this side in pixels, or None."""
    least = LEAST_PATCHES * patch
    if tile >= least and tile % patch == 0:
        return None
    low = max(least, tile // patch * patch)
    return f"tile is {tile}, must be a multiple of the patch ({patch}) from {least}, such as {low}"


def blended_code(
    encode: Callable[[Tensor], Tensor], image: Tensor, *, patch: int, tile: int | None = None
) -> Tensor:
    """The code of an image, from tiles that overlap by a quarter at least.

    It is the code that is blended: the logits of both probes are linear in it, and the norm that cosines are
    divided by is then that of the same blend.

    Args:
        encode: (1, 3, H, W) to its code (1, D, h, w) float32.
        image: (1, 3, H, W), sides multiples of the patch.
        patch: in pixels.
        tile: side of a tile in pixels, a multiple of the patch; None takes the image whole.

    Returns:
        (1, D, h, w) float32; that of the whole image where it is not larger than a tile.
    """
    grid = [side // patch for side in image.shape[-2:]]  # (h, w)
    sides = [min(side, tile // patch) if tile else side for side in grid]
    if sides == grid:
        return encode(image)
    rows, columns = (tile_starts(n, side) for n, side in zip(grid, sides, strict=True))
    window = _window(sides[0]).outer(_window(sides[1])).to(image.device)  # (t_h, t_w)
    total, weight = None, torch.zeros(grid, device=image.device)  # (h, w)
    for top in rows:
        for left in columns:
            place = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
            pixels = (..., *(slice(part.start * patch, part.stop * patch) for part in place[1:]))
            code = encode(image[pixels])  # (1, D, t_h, t_w)
            if total is None:
                total = code.new_zeros(*code.shape[:2], *grid)  # (1, D, h, w)
            total[place] += window * code
            weight[place] += window
    return total.div_(weight)


def tile_starts(length: int, side: int) -> list[int]:
    """First positions of evenly spread tiles of `side` over `length`; a quarter of each at least overlaps."""
    if side >= length:
        return [0]
    steps = -(-(length - side) // (side - side // 4))
    return [round(step * (length - side) / steps) for step in range(steps + 1)]


def _window(side: int) -> Tensor:
    """(side,) weights that fall off to the tile's edges and are nowhere 0: a Hann window."""
    return torch.sin(torch.pi * (torch.arange(side) + 0.5) / side).square()
