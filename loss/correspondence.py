"""The loss of STEGO: distils correspondences of frozen features into the code.

Hamilton, Zhang, Hariharan, Snavely, Freeman, "Unsupervised Semantic Segmentation by Distilling Feature
Correspondences", ICLR 2022. An image is paired with itself, with a nearest neighbour and with others of the
batch; each pair is compared at S x S random points of each image.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from loss.kernels import ieee_float32
from utils.training.distributed import all_gather, all_reduce_mean, own_slice

STABLE_MAXIMUM = 0.8  # of the codes' correspondences, with `stabilize`
EPSILON = 1e-10  # smallest norm that a vector is divided by


class Correspondence(NamedTuple):
    """The means over all pairs of points, () float32 each, and their weighted sum."""

    self_loss: Tensor
    knn_loss: Tensor
    rand_loss: Tensor
    total: Tensor  # differentiable in the codes, as the others


def draw_pairs(
    images: int, *, samples: int, negatives: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws points and random partners for a batch of images with a CPU generator.

    Returns:
        coords1, coords2: points (x, y) in [-1, 1) of the images and of their partners, (B, S, S, 2).
        perms: a different image for each image, (negatives, B) int64; two images may share one, and a single
            image is its own.
    """
    points = 2 * torch.rand(2, images, samples, samples, 2, generator=generator) - 1  # (2, B, S, S, 2)
    own = torch.arange(images)  # (B,)
    orders = torch.stack([torch.randperm(images, generator=generator) for _ in range(negatives)])
    return points[0], points[1], (orders + (orders == own)) % images


def correspondence_loss(
    feat: Tensor,
    feat_pos: Tensor,
    code: Tensor,
    code_pos: Tensor,
    *,
    coords1: Tensor,
    coords2: Tensor,
    perms: Tensor,
    weights: Mapping[str, float],
    shifts: Mapping[str, float],
    pointwise: bool = True,
    zero_clamp: bool = True,
    stabilize: bool = False,
) -> Correspondence:
    """The loss of one batch; the gradient flows through the codes only.

    With several processes, maps are this rank's equal slice of the batch; coordinates and permutations are
    those of the whole batch, the same on all ranks. The values are those of the whole batch, the gradient
    this rank's part of it.

    Args:
        feat, feat_pos: frozen features of the images and of their neighbours, (B, D, h, w).
        code, code_pos: their codes, (B, K, h, w).
        coords1, coords2: points (x, y) of the images and of their partners, (B, S, S, 2); -1 and 1 are the
            centres of the outermost patches. The order of the points does not matter.
        perms: the random partner of each image, (negatives, B) int64.
        weights, shifts: lambda and b of the pairs "self", "knn" and "rand".
        pointwise: centre the correspondences of each point's features, keeping the mean over the batch.
        zero_clamp: clamp negative correspondences of the codes to 0.
        stabilize: clamp those above 0.8 to 0.8.
    """
    with torch.autocast(code.device.type, enabled=False), ieee_float32():
        first, second = own_slice(coords1), own_slice(coords2)
        maps = feat.detach().float(), code.float()
        batch = [all_gather(values) for values in maps]  # of all ranks
        anchors = _sample(maps, first)
        partners = {
            "self": [anchors],
            "knn": [_sample((feat_pos.detach().float(), code_pos.float()), second)],
            "rand": [_sample([values[own_slice(perm)] for values in batch], second) for perm in perms],
        }
        clamp = (0.0 if zero_clamp else -torch.inf, STABLE_MAXIMUM if stabilize else torch.inf)
        losses = []
        for kind, pairs in partners.items():
            terms = [_pair_loss(anchors, pair, shifts[kind], clamp, pointwise) for pair in pairs]
            losses.append(torch.stack(terms).mean())
        total = sum(weights[kind] * loss for kind, loss in zip(partners, losses, strict=True))
        return Correspondence(*losses, total)


def _sample(maps: Sequence[Tensor], points: Tensor) -> list[Tensor]:
    """Unit vectors of maps at points, (B, C, h, w) and (B, S, S, 2) -> (B, C, S*S)."""
    sample = partial(F.grid_sample, padding_mode="border", align_corners=True)
    if torch.are_deterministic_algorithms_enabled():  # on CUDA, the gradient of grid_sample is not
        sample = _sample_by_product
    return [F.normalize(sample(x, points.to(x)).flatten(2), dim=1, eps=EPSILON) for x in maps]


def _sample_by_product(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear interpolation as a matrix product: (B, C, h, w) and (B, S, S, 2) -> (B, C, S*S)."""
    hats = []
    for axis, size in enumerate((maps.shape[3], maps.shape[2])):
        place = ((points[..., axis].flatten(1) + 1) * (size - 1) / 2).clamp(0, size - 1)  # (B, S*S)
        steps = torch.arange(size, device=place.device, dtype=place.dtype)
        hats.append((1 - (place[..., None] - steps).abs()).clamp(min=0))  # (B, S*S, w), then (B, S*S, h)
    weights = (hats[1][..., None] * hats[0][:, :, None]).flatten(2)  # (B, S*S, h*w)
    return maps.flatten(2) @ weights.transpose(1, 2)


def _pair_loss(
    anchors: list[Tensor], partners: list[Tensor], shift: float, clamp: tuple[float, float], pointwise: bool
) -> Tensor:
    """Mean of -S * (F - b) over all points of each image and of its partner, () float32, over all ranks.

    Both are lists of sampled features (B, D, S*S) and codes (B, K, S*S), of unit length; `clamp` bounds S.
    """
    target, found = (a.transpose(1, 2) @ b for a, b in zip(anchors, partners, strict=True))  # (B, S*S, S*S)
    if pointwise:
        target = target - target.mean(dim=2, keepdim=True) + all_reduce_mean(target.mean())
    return -all_reduce_mean((found.clamp(*clamp) * (target - shift)).mean())
