"""Gaussian filtering in many dimensions: the permutohedral lattice (Adams, Baek, Davis, Eurographics 2010).

The values of points with d features are splatted onto the vertices of the simplices that hold them, blurred
along the d + 1 axes of the lattice and sliced back. Each of these steps is a sparse matrix with short rows,
written as `embedding_bag`: every output row is summed by one reader in a fixed order, so that the result is
deterministic on a GPU too, and nothing waits for the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

CHANNELS = 64  # filtered at once


@dataclass(frozen=True)
class PermutohedralLattice:
    """The lattice around N points with d features: M vertices, by first use.

    Attributes:
        vertices: (N, d+1) int32, the simplex of each point.
        weights: (N, d+1) float32 barycentric weights; >= 0 up to rounding, rows sum to 1.
        neighbours: (d+1, M, 3) int32, each vertex and its two neighbours along each axis; itself where a
            neighbour is in no simplex.
        shares: (d+1, M, 3) float32, their weights: 1, 1/2, 1/2; 0 where there is no neighbour.
        points: (N * (d+1),) int32, the points of each vertex, one vertex after another.
        point_weights: (N * (d+1),) float32, `weights` in that order.
        offsets: (M+1,) int32, where each vertex's points begin.
    """

    vertices: Tensor
    weights: Tensor
    neighbours: Tensor
    shares: Tensor
    points: Tensor
    point_weights: Tensor
    offsets: Tensor

    def filter(self, values: Tensor) -> Tensor:
        """Splat, blur, slice.

        At most 2 M * min(C, 64) floats are alive beside the lattice and the values; M is at most N * (d+1).

        Args:
            values: (N, C) float32.

        Returns:
            (N, C) float32.
        """
        if values.shape[1] > CHANNELS:
            return torch.cat([self.filter(part) for part in values.split(CHANNELS, dim=1)], dim=1)
        table = F.embedding_bag(
            self.points,
            values,
            self.offsets,
            mode="sum",
            per_sample_weights=self.point_weights,
            include_last_offset=True,
        )  # (M, C)
        for neighbours, shares in zip(self.neighbours, self.shares, strict=True):
            table = F.embedding_bag(neighbours, table, mode="sum", per_sample_weights=shares)
        return F.embedding_bag(self.vertices, table, mode="sum", per_sample_weights=self.weights)

    def scaled(self, factor: Tensor, *, weight: float = 1.0) -> PermutohedralLattice:
        """The lattice whose filter is v -> weight * factor * filter(factor * v), at no cost per call.

        Args:
            factor: (N,) float32.
            weight: of the result.
        """
        return replace(
            self,
            weights=self.weights * (weight * factor)[:, None],
            point_weights=self.point_weights * factor[self.points],
        )

    def normalised(self, *, weight: float = 1.0) -> PermutohedralLattice:
        """The filter between two multiplications by 1 / sqrt(what it makes of ones)."""
        ones = self.weights.new_ones(len(self.weights), 1)
        return self.scaled((self.filter(ones)[:, 0] + 1e-20).rsqrt(), weight=weight)


@dataclass(frozen=True)
class _Simplices:
    """Keys of the vertices that hold each point, packed into one number, and how axes step from key to key.

    Attributes:
        keys: (N, d+1) int64, by remainder.
        weights: (N, d+1) float32.
        steps: (d+1,) int64, key of the next vertex along an axis less that of a vertex.
    """

    keys: Tensor
    weights: Tensor
    steps: Tensor


def build_lattice(features: Tensor) -> PermutohedralLattice:
    """The lattice whose filter has standard deviation 1 in the features.

    Waits for the device, as M is not known before. The filter is that of the paper up to float32 rounding:
    where a point lies on the border of two simplices, rounding decides which vertices there are.

    Args:
        features: (N, d) float32, N > 0.

    Raises:
        ValueError: the features span too wide a range for 64-bit keys.
    """
    simplices = _enclose(features)
    count = simplices.keys.shape[1]  # d+1
    ordered, place = simplices.keys.flatten().sort(stable=True)
    keys, of_place, uses = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    # Numbered by first use, vertices of neighbouring points lie side by side: half the time on a CPU.
    by_use = place[uses.cumsum(0) - uses].argsort()
    number = torch.empty_like(by_use)
    number[by_use] = torch.arange(len(keys), device=keys.device)
    vertices = torch.empty_like(place)
    vertices[place] = number[of_place]
    place = vertices.sort(stable=True).indices
    offsets = F.pad(uses[by_use].cumsum(0), (1, 0))
    neighbours, shares = _neighbours(keys, simplices.steps, by_use=by_use, number=number)
    rescale = 1 / (1 + 2.0 ** (1 - count))  # what the blur adds along the d axes beside the first
    return PermutohedralLattice(
        vertices=vertices.view(-1, count).int(),
        weights=simplices.weights,
        neighbours=neighbours,
        shares=shares,
        points=place.div(count, rounding_mode="floor").int(),
        point_weights=simplices.weights.flatten()[place] * rescale,
        offsets=offsets.int(),
    )


def _elevate(features: Tensor) -> Tensor:
    """(N, d) -> (N, d+1), on the hyperplane of sum 0, scaled so that the blur has variance 1.

    Scale and sums are rounded as Krähenbühl's implementation rounds them, so that points that lie on the
    border of two simplices fall into the same one as there, on every device.
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


def _enclose(features: Tensor) -> _Simplices:
    """The simplex of each point, section 3.1 of the paper, with coordinates in the order of their ranks."""
    elevated = _elevate(features)  # (N, d+1)
    count = elevated.shape[1]
    rank = torch.arange(count, device=features.device)
    nearest = (elevated * (1 / count)).round()
    excess = nearest.sum(dim=1, keepdim=True).long()  # (N, 1); 0 where `nearest` is on the lattice
    order = (elevated - nearest * count).argsort(dim=1, descending=True, stable=True)
    unwrapped = (rank - excess).remainder(count)  # (N, d+1), which rank this one was before `excess`
    axis = order.gather(1, unwrapped)  # (N, d+1), the coordinate of each rank
    moved = unwrapped + excess
    shift = (moved < 0).long() - (moved >= count).long()
    origin = (nearest.gather(1, axis).long() + shift) * count  # the remainder-0 vertex, by rank
    height = (elevated.gather(1, axis) - origin) * (1 / count)  # falling from rank 0 to d
    first = 1 - height[:, :1] + height[:, -1:]
    weights = torch.cat((first, (height[:, :-1] - height[:, 1:]).flip(1)), dim=1)
    strides = _strides(elevated)
    start = (origin * strides[axis]).sum(dim=1, keepdim=True)  # (N, 1), key of remainder 0
    # From a remainder to the next all coordinates grow by one, and the highest rank left falls by d+1.
    rise = strides.sum() - count * strides[axis[:, 1:].flip(1)]  # (N, d)
    return _Simplices(
        keys=torch.cat((start, start + rise.cumsum(dim=1)), dim=1),
        weights=weights,
        steps=strides.sum() - count * strides,
    )


def _strides(elevated: Tensor) -> Tensor:
    """(d+1,) int64 that make a distinct key of every vertex in reach; the last coordinate is not needed."""
    count = elevated.shape[1]
    low, high = elevated[:, :-1].aminmax(dim=0)
    span = (high - low).ceil().long() + 6 * count  # a vertex or its neighbour is within 3 (d+1) of a point
    if span.float().prod() >= 2.0**62:
        raise ValueError(f"the features span {span.tolist()} lattice units, too many for 64-bit keys")
    return torch.cat((F.pad(span[:-1], (1, 0), value=1).cumprod(dim=0), span.new_zeros(1)))


def _neighbours(keys: Tensor, steps: Tensor, *, by_use: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """`neighbours` and `shares` of the lattice, from its (M,) sorted keys and their renumbering."""
    m = len(keys)
    here = torch.arange(m, device=keys.device)
    neighbours, shares = [], []
    for step in steps:
        found = torch.searchsorted(keys, keys + step).clamp_(max=m - 1)  # (M,)
        ahead = torch.where(keys[found] == keys + step, number[found], m)[by_use]
        behind = torch.full((m + 1,), m, device=keys.device)
        behind[ahead] = here  # whoever is ahead of me has me behind; index m takes the misses
        both = torch.stack((ahead, behind[:-1]), dim=1)  # (M, 2)
        missing = both == m
        neighbours.append(torch.cat((here[:, None], torch.where(missing, here[:, None], both)), dim=1).int())
        shares.append(F.pad((~missing) * 0.5, (1, 0), value=1.0))
    return torch.stack(neighbours), torch.stack(shares)
