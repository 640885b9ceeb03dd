"""HP's local hidden positives: the code of a patch, mixed over its neighbours by attention."""

import torch
from torch import Tensor
from torch.nn import functional as F

SIGMA = 28.0  # scale of the attention, at any grid
QUANTILES = (0.1, 0.9)  # the logits of each patch are clipped to these
SIDE = 3  # patches per side of a neighbourhood


@torch.no_grad()
def local_attention(attention_logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention of each patch to its 3x3 neighbourhood, (B, 9, h, w) float32; 0 outside the grid.

    Args:
        attention_logits: of the frozen last block, before softmax, (B, heads, 1 + h*w, 1 + h*w). Heads are
            averaged, and tokens before the patches ignored.
        grid: (h, w).
    """
    height, width = grid
    where = {"device": attention_logits.device}
    rows, columns = torch.arange(height, **where)[:, None], torch.arange(width, **where)  # (h, 1), (w,)
    found = []
    for image in attention_logits:  # one at a time, as the quantiles take several times the memory
        patches = height * width
        logits = image[:, -patches:, -patches:].float().mean(dim=0)  # (h*w, h*w)
        low, high = torch.quantile(logits, logits.new_tensor(QUANTILES), dim=1)[..., None]  # (h*w, 1)
        attention = logits.clamp(low, high).softmax(dim=1)
        attention = torch.where(attention < 1 / patches, 0, SIGMA * attention)  # 1 / (h*w) is the mean
        padded = F.pad(attention.view(height, width, height, width), (1, 1, 1, 1))  # (h, w, h + 2, w + 2)
        near = [padded[rows, columns, rows + y, columns + x] for y in range(SIDE) for x in range(SIDE)]
        found.append(torch.stack(near))  # (9, h, w)
    return torch.stack(found)


def mix_local(code: Tensor, attention_logits: Tensor) -> Tensor:
    """The mean over each patch's 3x3 neighbourhood of attention times code, (B, K, h, w).

    Only neighbours inside the grid count; attention below the patch's mean is set to 0. The gradient flows to
    the code of all neighbours.

    Args:
        code: (B, K, h, w).
        attention_logits: see `local_attention`.
    """
    grid = code.shape[-2:]
    attention = local_attention(attention_logits, grid)  # (B, 9, h, w)
    neighbours = sum(_shifted(code.new_ones(grid)))  # (h, w): 4 in corners, 6 at borders, 9 inside
    mixed = sum(a[:, None] * part for a, part in zip(attention.unbind(1), _shifted(code), strict=True))
    return mixed / neighbours


def _shifted(values: Tensor) -> list[Tensor]:
    """The nine neighbours of each position of (..., h, w), 0 outside, in the order of `local_attention`."""
    height, width = values.shape[-2:]
    padded = F.pad(values, (1, 1, 1, 1))  # (..., h + 2, w + 2)
    return [padded[..., y : y + height, x : x + width] for y in range(SIDE) for x in range(SIDE)]
