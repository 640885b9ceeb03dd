"""HP's local mixing: the mean of the codes around a patch, weighted by attention."""

import torch
from torch import Tensor
from torch.nn import functional as F

SIGMA = 28.0  # scale of the attention, at any grid
QUANTILES = (0.1, 0.9)  # the logits of each patch are clipped to these


@torch.no_grad()
def local_attention(attention_logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention of each patch to its 3x3 neighbourhood, (B, 9, h, w) float32; 0 outside the grid.

    `attention_logits` (B, heads, T, T) are those of the frozen last block before softmax. Heads are averaged,
    and tokens before the patches ignored.
    """
    (height, width), device, found = grid, attention_logits.device, []
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    patches = height * width
    for image in attention_logits:  # one at a time, as sorting takes several times the memory
        logits = image[:, -patches:, -patches:].float().mean(dim=0)  # (h*w, h*w)
        ordered = logits.sort(dim=1).values  # (h*w, h*w)
        low, high = (_quantile(ordered, share) for share in QUANTILES)  # (h*w, 1) each
        attention = logits.clamp(low, high).softmax(dim=1)
        attention = torch.where(attention < 1 / patches, 0, SIGMA * attention)  # 1 / (h*w) is the mean
        shifted = _shifted(attention.view(height, width, height, width))  # (h, w, h, w) each
        found.append(torch.stack([part[rows, columns, rows, columns] for part in shifted]))  # (9, h, w)
    return torch.stack(found)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """A quantile of each sorted row, interpolated, (n, 1); torch.quantile would wait for a GPU."""
    place = share * (ordered.shape[1] - 1)
    below = int(place)
    values = ordered[:, below : below + 2]  # (n, 2), or (n, 1) at the end
    return values[:, :1].lerp(values[:, -1:], place - below)


def mix_local(code: Tensor, attention_logits: Tensor) -> Tensor:
    """The mean over each patch's 3x3 neighbourhood of attention times code, (B, K, h, w).

    Only neighbours inside the grid count; attention below the patch's mean is set to 0. The gradient flows to
    the code (B, K, h, w) of all neighbours. For the logits see `local_attention`.
    """
    grid = code.shape[-2:]
    attention = local_attention(attention_logits, grid)  # (B, 9, h, w)
    neighbours = sum(_shifted(code.new_ones(grid)))  # (h, w): 4 in corners, 6 at borders, 9 inside
    mixed = sum(a[:, None] * part for a, part in zip(attention.unbind(1), _shifted(code), strict=True))
    return mixed / neighbours


def _shifted(values: Tensor) -> list[Tensor]:
    """The nine neighbours of each position of (..., h, w), 0 outside."""
    height, width = values.shape[-2:]
    padded = F.pad(values, (1, 1, 1, 1))  # (..., h + 2, w + 2)
    return [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
