"""Spherical k-means, and the stability of the number of clusters under resampling."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.clustering import adjusted_rand_score

ITERATIONS = 20
CANDIDATES = 4  # per centroid of the start


def kmeans(rows: Tensor, clusters: int, drawn: torch.Generator) -> Tensor:
    """Centroids (K, D) of unit length for rows (N, D) of unit length, from a greedy k-means++ start."""
    centroids = rows[torch.randint(len(rows), (1,), generator=drawn)]  # (1, D)
    nearest = rows @ centroids[0]  # (N,), similarity to the nearest centroid
    for _ in range(clusters - 1):
        distance = (1 - nearest).clamp_min(1e-9).double().cumsum(0)  # (N,)
        chosen = torch.searchsorted(distance, distance[-1] * torch.rand(CANDIDATES, generator=drawn))
        candidates = rows[chosen.clamp_max(len(rows) - 1)]  # (C, D)
        reached = torch.maximum(rows @ candidates.T, nearest[:, None])  # (N, C)
        best = reached.sum(dim=0).argmax()
        centroids, nearest = torch.cat([centroids, candidates[best, None]]), reached[:, best]
    for _ in range(ITERATIONS):
        sums = torch.zeros_like(centroids).index_add_(0, assign(rows, centroids), rows)  # (K, D)
        empty = (sums == 0).all(dim=1, keepdim=True)  # (K, 1)
        centroids = torch.where(empty, centroids, F.normalize(sums, dim=1))
    return centroids


def assign(rows: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid (K, D) of each row (N, D), (N,) int64."""
    return (rows @ centroids.T).argmax(dim=1)


def stability(images: Tensor, sizes: Sequence[int], drawn: torch.Generator) -> list[float]:
    """For each number of clusters, the adjusted Rand index of k-means fitted to two random halves of images.

    It is computed over all patches of the `images`, (P, h*w, D) with rows of unit length.
    """
    rows, halves = images.flatten(0, 1), torch.randperm(len(images), generator=drawn).chunk(2)
    halves = [images[half].flatten(0, 1) for half in halves]  # (P/2*h*w, D) each
    found = []
    for size in sizes:
        first, second = (assign(rows, kmeans(half, size, drawn)) for half in halves)
        found.append(float(adjusted_rand_score(first, second)))
    return found


def clear_size(sizes: Sequence[int], agreement: Sequence[float]) -> int | None:
    """The number of clusters at a clear peak or knee of the agreement, or None.

    It is the largest whose agreement is within 0.05 of the best. It is clear if it is neither the first nor
    the last, its agreement is 0.8 or more, and beyond the next number agreement is lower by 0.1 or more.
    """
    knee = max(index for index, value in enumerate(agreement) if value >= max(agreement) - 0.05)
    clear = 0 < knee < len(sizes) - 1 and agreement[knee] >= 0.8
    return sizes[knee] if clear and max(agreement[knee + 2 :], default=0) <= agreement[knee] - 0.1 else None
