"""High-dimensional Gaussian filtering on the permutohedral lattice (Adams, Baek, Davis, Eurographics 2010).

Splat, blur along the d + 1 axes and slice are sparse matrices, written as `embedding_bag`: each output row is
summed in a fixed order, so the result is deterministic on a GPU too.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

CHANNELS = 64  # filtered at a time


@dataclass(frozen=True)
class PermutohedralLattice:
    """The lattice of N points with d features: M vertices, numbered by first use, M <= N * (d+1)."""

    vertices: Tensor  # (N, d+1) int32, the simplex of each point
    weights: Tensor  # (N, d+1) float32, barycentric: rows sum to 1
    neighbours: Tensor  # (d+1, M, 3) int32, each vertex and its two neighbours on an axis; itself if missing
    shares: Tensor  # (d+1, M, 3) float32, their weights: 1, 1/2, 1/2; 0 if missing
    points: Tensor  # (N * (d+1),) int32, the points of each vertex, one vertex after another
    point_weights: Tensor  # (N * (d+1),) float32, `weights` in that order
    offsets: Tensor  # (M+1,) int32, where each vertex's points begin

    def filter(self, values: Tensor) -> Tensor:
        """Splats, blurs and slices, (N, C) float32 -> (N, C); holds 2 M * min(C, 64) floats."""
        if values.shape[1] > CHANNELS:
            return torch.cat([self.filter(part) for part in values.split(CHANNELS, dim=1)], dim=1)
        weights = {"mode": "sum", "per_sample_weights": self.point_weights}
        table = F.embedding_bag(
            self.points, values, self.offsets, include_last_offset=True, **weights
        )  # (M, C)
        for neighbours, shares in zip(self.neighbours, self.shares, strict=True):
            table = F.embedding_bag(neighbours, table, mode="sum", per_sample_weights=shares)
        return F.embedding_bag(self.vertices, table, mode="sum", per_sample_weights=self.weights)

    def normalised(self, weight: float) -> "PermutohedralLattice":
        """The lattice whose filter is v -> weight * n * filter(n * v) with n = 1 / sqrt(filter(1))."""
        ones = self.weights.new_ones(len(self.weights), 1)
        factor = (self.filter(ones)[:, 0] + 1e-20).rsqrt()  # (N,)
        weights = self.weights * (weight * factor)[:, None]
        return replace(self, weights=weights, point_weights=self.point_weights * factor[self.points])


def build_lattice(features: Tensor) -> PermutohedralLattice:
    """The lattice whose filter has standard deviation 1 in the features, (N, d) float32 with N > 0."""
    all_keys, weights, steps = _enclose(features)
    count = all_keys.shape[1]  # d+1
    ordered, place = all_keys.flatten().sort(stable=True)
    keys, of_place, uses = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)  # (M,)
    # Numbered by first use, vertices of neighbouring points are close in memory: half the time on a CPU.
    by_use = place[uses.cumsum(0) - uses].argsort()
    number = torch.empty_like(by_use)
    number[by_use] = torch.arange(len(keys), device=keys.device)
    vertices = torch.empty_like(place)
    vertices[place] = number[of_place]
    place = vertices.sort(stable=True).indices
    neighbours, shares = _neighbours(keys, steps, by_use=by_use, number=number)
    rescale = 1 / (1 + 2.0 ** (1 - count))  # undoes the gain of the blur along d axes
    return PermutohedralLattice(
        vertices=vertices.view(-1, count).int(),
        weights=weights,
        neighbours=neighbours,
        shares=shares,
        points=place.div(count, rounding_mode="floor").int(),
        point_weights=weights.flatten()[place] * rescale,
        offsets=F.pad(uses[by_use].cumsum(0), (1, 0)).int(),
    )


def _elevate(features: Tensor) -> Tensor:
    """(N, d) -> (N, d+1), on the hyperplane of sum 0, scaled so that the blur has variance 1.

    Scale and sums are rounded as in Krähenbühl's implementation, so that points on the border of two
    simplices are assigned to the same one on every device.
    """
    d = features.shape[1]
    deviation = torch.tensor((d + 1) * math.sqrt(2 / 3), dtype=torch.float32).double()
    axis = torch.arange(d, dtype=torch.float64)
    scale = (deviation / ((axis + 1) * (axis + 2)).sqrt()).float().to(features.device)
    scaled = (features * scale).unbind(dim=1)
    total = torch.zeros_like(scaled[0])
    elevated = []
    for i in range(d, 0, -1):
        elevated.append(total - scaled[i - 1] * i)
        total = total + scaled[i - 1]
    return torch.stack([total, *reversed(elevated)], dim=1)


def _enclose(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex of each point (section 3.1 of the paper).

    Returns the keys of its vertices, (N, d+1) int64; barycentric weights, (N, d+1); and the difference of the
    keys of two neighbours on each axis, (d+1,) int64.
    """
    elevated = _elevate(features)  # (N, d+1)
    count = elevated.shape[1]
    rank = torch.arange(count, device=features.device)
    nearest = (elevated * (1 / count)).round()
    excess = nearest.sum(dim=1, keepdim=True).long()  # (N, 1); 0 if `nearest` is on the lattice
    order = (elevated - nearest * count).argsort(dim=1, descending=True, stable=True)
    unwrapped = (rank - excess).remainder(count)  # (N, d+1), the rank before `excess` is removed
    axis = order.gather(1, unwrapped)  # (N, d+1), the coordinate of each rank
    moved = unwrapped + excess
    shift = (moved < 0).long() - (moved >= count).long()
    origin = (nearest.gather(1, axis).long() + shift) * count  # the vertex of remainder 0, by rank
    height = (elevated.gather(1, axis) - origin) * (1 / count)  # descending from rank 0 to d
    first = 1 - height[:, :1] + height[:, -1:]
    weights = torch.cat((first, (height[:, :-1] - height[:, 1:]).flip(1)), dim=1)
    strides = _strides(elevated)
    start = (origin * strides[axis]).sum(dim=1, keepdim=True)  # (N, 1), key of remainder 0
    # From one remainder to the next all coordinates grow by 1, and the highest remaining rank falls by d+1.
    steps = strides.sum() - count * strides  # (d+1,)
    rise = steps[axis[:, 1:].flip(1)]  # (N, d)
    return torch.cat((start, start + rise.cumsum(dim=1)), dim=1), weights, steps


def _strides(elevated: Tensor) -> Tensor:
    """(d+1,) int64 that give every vertex in reach its own key; those of images are far below 2**62."""
    count = elevated.shape[1]
    low, high = elevated[:, :-1].aminmax(dim=0)  # the last coordinate follows from the others
    span = (high - low).ceil().long() + 6 * count  # vertices and neighbours are within 3 (d+1) of a point
    return torch.cat((F.pad(span[:-1], (1, 0), value=1).cumprod(dim=0), span.new_zeros(1)))


def _neighbours(keys: Tensor, steps: Tensor, *, by_use: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """`neighbours` and `shares` of the lattice from its sorted keys (M,) and their renumbering."""
    m = len(keys)
    here = torch.arange(m, device=keys.device)
    neighbours, shares = [], []
    for step in steps:
        found = torch.searchsorted(keys, keys + step).clamp_(max=m - 1)  # (M,)
        ahead = torch.where(keys[found] == keys + step, number[found], m)[by_use]
        behind = torch.full((m + 1,), m, device=keys.device)
        behind[ahead] = here  # the inverse of `ahead`; index m collects the missing ones
        both = torch.stack((ahead, behind[:-1]), dim=1)  # (M, 2)
        missing = both == m
        neighbours.append(torch.cat((here[:, None], torch.where(missing, here[:, None], both)), dim=1).int())
        shares.append(F.pad((~missing) * 0.5, (1, 0), value=1.0))
    return torch.stack(neighbours), torch.stack(shares)
