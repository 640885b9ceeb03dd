"""The nearest neighbours of each train image by its frozen features, computed once and kept in a file."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dataset.base import Batch, SegmentationDataset
from dataset.token_cache import cache_entry
from utils.config.options import Options
from utils.errors import UserError
from utils.files import replacing
from utils.progress import Bar
from utils.training.randomness import generator

SIMILARITIES = 2**26  # entries of a block of the similarity matrix
FeatureEncoder = Callable[..., Tensor]  # images or tokens, `label` -> frozen features (B, D, h, w)


def nearest_neighbours(
    items: SegmentationDataset,
    loader: Iterable[Batch],
    encode: FeatureEncoder,
    options: Options,
    *,
    model: str,
) -> Tensor:
    """The `stego.num_neighbors` most similar other items of each item, (n, num_neighbors) int64.

    Items are compared by the cosine of the mean of their features over the patches. The table is stored
    beside cached tokens, where later runs with the same files, geometry, options and weights find it.
    `loader` yields all items in order, `model` names weights and precision.
    """
    chosen, seed = options.stego, options.train.seed
    if chosen.num_neighbors >= len(items):
        allowed = f"below {len(items)}, the number of train items"
        raise UserError(f"stego.num_neighbors is {chosen.num_neighbors}, must be {allowed}")
    drawn = seed if chosen.knn_dropout or items.geometry.crop == "random" else None
    about = type(items).__name__, model, chosen.num_neighbors, chosen.knn_dropout, drawn
    with cache_entry(items, options, "neighbours", *about) as path:
        if not path.is_file():
            means = _mean_features(loader, encode, dropout=chosen.knn_dropout, seed=seed)  # (n, D)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, most_similar(means, chosen.num_neighbors).int().numpy())
        return torch.from_numpy(np.load(path)).long()


def most_similar(means: Tensor, count: int) -> Tensor:
    """The `count` unit vectors (n, D) most similar to each, without itself, (n, count) int64 on the CPU."""
    found, rows = [], max(1, SIMILARITIES // len(means))
    for own in torch.arange(len(means), device=means.device).split(rows):  # (r,)
        similarity = means[own] @ means.T  # (r, n)
        similarity.scatter_(1, own[:, None], -torch.inf)
        found.append(similarity.topk(count, dim=1).indices.cpu())
    return torch.cat(found)


def _mean_features(loader: Iterable[Batch], encode: FeatureEncoder, *, dropout: float, seed: int) -> Tensor:
    """Unit-length means over the patches, (n, D) float32, with channel dropout as published if asked for."""
    found, drawn = [], generator(seed, "neighbour dropout")
    for batch in Bar(loader, desc="neighbours", unit="batch"):
        means = encode(batch.inputs, label=batch.label).float().mean(dim=(2, 3))  # (B, D)
        if dropout:
            means = means * (torch.rand(means.shape, generator=drawn) >= dropout).to(means.device)
        found.append(F.normalize(means, dim=1))
    return torch.cat(found)
