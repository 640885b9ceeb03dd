"""What frozen patch features are worth: a linear probe and k-means, without a head or a loss of PPAP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backbone import FrozenViT
from model.set_quality import patch_classes
from utils.training.randomness import generator
from utils.vision.labels import IGNORE
from utils.vision.metrics import score
from utils.vision.transforms import normalise

PROBE_STEPS, PROBE_BATCH, PROBE_LR = 500, 4096, 1e-2
KMEANS_ROUNDS, KMEANS_STARTS = 50, 5


@dataclass(frozen=True)
class PatchFeatures:
    """Features of labelled patches.

    Attributes:
        rows: (N, D) float32, unit length.
        classes: (N,) int64, the commonest class of each patch, all at least 0.
    """

    rows: Tensor
    classes: Tensor


class Labelled(Protocol):
    """An item of a data set: image (3, H, W) uint8, label (H, W) int64."""

    image: Tensor
    label: Tensor


def backbone_worth(
    backbone: FrozenViT, train: Sequence[Labelled], held_out: Sequence[Labelled], *, n_classes: int, seed: int
) -> dict[str, float]:
    """Accuracy in percent of a linear probe and of k-means on frozen patch features.

    Args:
        backbone: on the CPU.
        train: items to fit them on.
        held_out: items to count on.
        n_classes: number of classes, and of clusters.
        seed: of both.
    """
    features = [
        patch_features(
            backbone, *(torch.stack([getattr(i, part) for i in split]) for part in ("image", "label"))
        )
        for split in (train, held_out)
    ]
    return {
        "linear probe": linear_accuracy(*features, n_classes=n_classes, seed=seed),
        "k-means": kmeans_accuracy(*features, n_classes=n_classes, seed=seed),
    }


@torch.no_grad()
def patch_features(
    backbone: FrozenViT, images: Tensor, labels: Tensor, *, batch_size: int = 64
) -> PatchFeatures:
    """The last block's features of every labelled patch.

    Args:
        backbone: the network.
        images: (S, 3, H, W) uint8.
        labels: (S, H, W) int64, 255 = ignore.
        batch_size: images at a time.
    """
    patch = backbone.spec.patch
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    maps = [
        backbone.last_features(backbone.tokens(normalise(part)), grid) for part in images.split(batch_size)
    ]  # (b, D, h, w) each
    rows = F.normalize(torch.cat(maps).permute(0, 2, 3, 1).flatten(0, 2), dim=1)  # (N, D)
    classes = patch_classes(labels, patch)  # (N,)
    return PatchFeatures(rows[classes != IGNORE], classes[classes != IGNORE])


def linear_accuracy(train: PatchFeatures, held_out: PatchFeatures, *, n_classes: int, seed: int) -> float:
    """Percent of held-out patches that a linear classifier of standardised features gets right."""
    drawn = generator(seed, "linear accuracy")
    mean, deviation = train.rows.mean(dim=0), train.rows.std(dim=0).clamp_min(1e-6)  # (D,) each
    weight = torch.zeros(n_classes, train.rows.shape[1], requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=PROBE_LR)
    for _ in range(PROBE_STEPS):
        chosen = torch.randint(len(train.rows), (PROBE_BATCH,), generator=drawn)
        logits = F.linear((train.rows[chosen] - mean) / deviation, weight, bias)  # (b, C)
        loss = F.cross_entropy(logits, train.classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = F.linear((held_out.rows - mean) / deviation, weight, bias).argmax(dim=1)
    return 100 * (predicted == held_out.classes).double().mean().item()


def kmeans_accuracy(train: PatchFeatures, held_out: PatchFeatures, *, n_classes: int, seed: int) -> float:
    """Percent of held-out patches right under spherical k-means, clusters matched by the Hungarian method.

    The mean over starts from random patches.
    """
    found = []
    for start in range(KMEANS_STARTS):
        order = torch.randperm(len(train.rows), generator=generator(seed, "k-means", start))
        centroids = train.rows[order[:n_classes]]  # (K, D)
        for _ in range(KMEANS_ROUNDS):
            nearest = (train.rows @ centroids.T).argmax(dim=1)  # (N,)
            sums = torch.zeros_like(centroids).index_add_(0, nearest, train.rows)
            centroids = F.normalize(sums, dim=1)
        nearest = (held_out.rows @ centroids.T).argmax(dim=1)
        pairs = held_out.classes * n_classes + nearest
        counts = torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)
        found.append(score(counts, matched=True).accuracy)
    return sum(found) / len(found)
