"""Suggests Phi_0, Psi_0 and a number of clusters from frozen features, without labels (run.py --suggest).

*Precision* above a similarity, the share of an anchor's positives that have its class, is estimated with
k-means: the share in the anchor's cluster, mean over anchors, divided by that of equally similar adjacent
patches, as a class may consist of several clusters. Fine partitions underestimate it, coarse ones
overestimate it. *Recall*, the share of same-class pairs above a similarity, is that of same-cluster pairs in
a few compact clusters, which overestimates it if classes are diverse. json/README.md has the measurements.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from loss import PPAPLoss
from loss.propagation import Boundaries
from model.kmeans import assign, clear_size, kmeans, stability
from model.methods.ppap import build_criterion
from model.module import PPAPModule
from model.set_quality import CHUNK, means, set_quality
from utils.errors import UserError
from utils.files import make_folder, write_json
from utils.plots.suggest_figure import draw_suggestion
from utils.progress import Bar
from utils.training.randomness import generator
from utils.training.trainer import build_trainer

PRECISION, RECALL = 0.8, 0.8  # targets, which reproduce what was chosen with labels on CamVid
ROUNDING = 0.02  # precision that rounding Phi_0 may cost
FINE, COARSE = (24, 28, 32, 40), (3, 4, 5, 6)  # clusters of the partitions for precision and for recall
SEPARATED = 0.85  # least `Estimate.separation`: CamVid has 0.97, the demo's ViT on CamVid 0.70
SIZES = (*range(2, 11), 12, 14, 16, 20, 24, 32, 48, 64)  # clusters whose stability is measured
RESAMPLES = 5
IMAGES, PATCHES, ANCHORS, BINS = 64, 8192, 1024, 400  # the sample, patches for k-means, anchors, thresholds


@dataclass(frozen=True)
class Estimate:
    """Same-class precision and recall at G thresholds of the similarity, all (G,) float32."""

    threshold: Tensor  # ascending, equally spaced
    precision: Tensor  # of the patches above it, mean over anchors that have any
    recall: Tensor  # share of the pairs of one class above it
    anchors: Tensor  # share of the anchors with a patch above it
    adjacent: Tensor  # density of the similarities of adjacent patches
    random: Tensor  # density of the similarities of anchors and their bank

    @property
    def separation(self) -> float:
        """Probability that adjacent patches are more similar than an anchor and a patch of its bank."""
        adjacent, random = self.adjacent / self.adjacent.sum(), self.random / self.random.sum()
        return float((adjacent * (random.cumsum(0) - random / 2)).sum())

    def boundaries(self) -> tuple[float, float]:
        """Phi_0 and Psi_0 at the targets; if precision does not reach its target, Phi_0 at the best."""
        precision = torch.where(self.anchors >= 0.5, self.precision, 0)  # (G,)
        phi = self.threshold[(precision >= min(PRECISION, precision.max())).int().argmax()]
        psi = self.threshold[(self.recall >= RECALL).sum() - 1].clamp_max(phi)
        digits = math.ceil(-math.log10((1 - self.threshold[0]) / 100))  # 1% of the range
        rounded = round(float(phi), digits)
        if self.at(self.precision, rounded) < self.at(self.precision, float(phi)) - ROUNDING:
            rounded = round(rounded + 10**-digits, digits)  # rounding down crossed a jump in precision
        return rounded, round(float(psi), digits)

    def at(self, curve: Tensor, similarity: float) -> float:
        """The value of a curve (G,) at the nearest threshold."""
        return float(curve[(self.threshold - similarity).abs().argmin()])


def suggest(module: PPAPModule, data: Any, *, folder: Path) -> dict[str, Any]:
    """Writes suggest.json, whose content it returns, and suggest.png, from train images without labels."""
    options, criterion = module.options, build_criterion(module.options)
    features = sample_features(module, data)  # (P, D, h, w)
    batch, seed = min(options.dataloader.batch_size, len(features)), options.train.seed
    found = estimate(features, batch=batch, drawn=generator(seed, "suggest"))
    phi, psi = found.boundaries()
    boundaries = replace(criterion.boundaries, phi=phi, psi=psi)
    shares = set_shares(features, criterion, boundaries, batch=batch, drawn=generator(seed, "anchors"))
    agreement = cluster_agreement(features, seed)  # (resamples, sizes)
    precision, mean, deviation = found.at(found.precision, phi), agreement.mean(dim=0), agreement.std(dim=0)
    result = {
        "images": len(features),
        "patches": features[:, 0].numel(),
        "initialcrit_pos": phi,
        "initialcrit_amb": psi,
        "precision": 100 * precision,
        "recall": 100 * found.at(found.recall, psi),
        "separation": 100 * found.separation,
        "warnings": _warnings(found.separation, precision),
        "shares": shares,
        "clusters": clear_size(SIZES, (mean - deviation).tolist()),
        "sizes": list(SIZES),
        "agreement": mean.tolist(),
        "agreement_deviation": deviation.tolist(),
        "words": f"training_coeff.initialcrit_pos={phi} training_coeff.initialcrit_amb={psi}",
    }
    write_json(make_folder(folder) / "suggest.json", result)
    draw_suggestion(folder / "suggest.png", result, {k: v.numpy() for k, v in vars(found).items()})
    return result


def _warnings(separation: float, precision: float) -> list[str]:
    warnings = []
    if separation < SEPARATED:
        warnings.append(
            f"adjacent patches are more similar than random ones in only {separation:.0%} of the cases "
            f"(below {SEPARATED:.0%}): these features hardly separate classes, and the estimates are not "
            "reliable; try other weights or a larger dataset.res"
        )
    if precision < PRECISION - ROUNDING:
        best = f"the best, {precision:.0%}, was taken"
        warnings.append(f"no boundary reaches a precision of {PRECISION:.0%}; {best}")
    return warnings


def sample_features(module: PPAPModule, data: Any) -> Tensor:
    """Criterion features of up to `IMAGES` random train images, (P, D, h, w) float32 on the CPU."""
    options, unlabelled = module.options, replace(data.train_set, hides_labels=True)
    if len(unlabelled) < 2:
        raise UserError(f"dataset.data_path is {options.dataset.data_path}: --suggest needs two train images")
    order = torch.randperm(len(unlabelled), generator=generator(options.train.seed, "suggested images"))
    trainer = build_trainer(options)
    batches = DataLoader(Subset(unlabelled, order[:IMAGES].tolist()), options.eval.batch_size)
    bar = Bar(batches, desc="features", unit="batch")
    return torch.cat([module.frozen_features(batch.image, trainer).float().cpu() for batch in bar])


def estimate(features: Tensor, *, batch: int, drawn: torch.Generator) -> Estimate:
    """Precision and recall in banks of `batch` images, from features (P, D, h, w) float32, P >= batch."""
    images = F.normalize(features.permute(0, 2, 3, 1), dim=3)  # (P, h, w, D)
    rows = images.flatten(0, 2)  # (P*h*w, D)
    parts = _partitions(rows, drawn).view(-1, *images.shape[:3])  # (K, P, h, w)
    pairs = rows[torch.randint(len(rows), (2, 100_000), generator=drawn)]  # (2, pairs, D)
    low = min(float(pairs.prod(dim=0).sum(dim=1).quantile(0.001)), 0.999)

    def above(similarity: Tensor, weight: Tensor) -> Tensor:
        """Sums of the weights (A, N) of the similarities (A, N) above each threshold, (A, G)."""
        index = ((similarity - low) / (1 - low) * BINS).long().clamp_(0, BINS - 1)
        index += BINS * torch.arange(len(index))[:, None]
        sums = torch.bincount(index.flatten(), weight.flatten().float(), minlength=BINS * len(index))
        return sums.view(len(index), BINS).flip(1).cumsum(1).flip(1)

    near, together = _adjacent(images, parts)  # (M,), (K, M)
    adjacent = above(near[None], torch.ones_like(near[None]))[0]  # (G,)
    expected = torch.cat([above(near[None], each[None]) for each in together])  # (K, G)
    expected = torch.where(adjacent > 0, expected / adjacent.clamp_min(1), 1)
    shares, hits, total, counts = 0, 0, 0, 0
    banks = len(images) // batch
    for number in range(banks):
        own = slice(number * batch, (number + 1) * batch)
        bank, clusters = images[own].flatten(0, 2), parts[:, own].flatten(1)  # (N, D), (K, N)
        for anchors in torch.randperm(len(bank), generator=drawn)[: ANCHORS // banks].split(CHUNK):
            similarity = bank[anchors] @ bank.T  # (A, N)
            other = torch.ones_like(similarity).scatter_(1, anchors[:, None], 0)  # without the anchor
            found = above(similarity, other)  # (A, G)
            same = [above(similarity, other * (each[anchors][:, None] == each)) for each in clusters]
            same = torch.stack(same)  # (K, A, G)
            shares = shares + (same / found.clamp_min(1)).sum(dim=1)  # (K, G)
            hits, total = hits + (found > 0).sum(dim=0), total + found.sum(dim=0)  # (G,) each
            counts = counts + same.sum(dim=1)  # (K, G)
    fine = len(FINE)
    precision = (shares / hits.clamp_min(1) / expected.clamp_min(1e-3))[:fine].mean(dim=0).clamp_max(1)
    recall = (counts / counts[:, :1].clamp_min(1))[fine:].mean(dim=0)
    threshold = torch.linspace(low, 1, BINS + 1)[:-1]
    near, random = (-sums.diff(append=torch.zeros(1)) for sums in (adjacent, total))
    precision = torch.maximum(precision, _beyond_valley(random))
    return Estimate(threshold, precision, recall, hits / hits.max(), near, random)


def _beyond_valley(density: Tensor) -> Tensor:
    """Precision from a valley between two modes of the density (G,): pairs of different classes, then of one.

    The first mode is continued beyond the valley as steeply as it falls before. 0 before the valley, and
    everywhere if the density at the valley is above half of the second mode.
    """
    width = BINS // 20 * 2 + 1
    smooth = F.avg_pool1d(density[None], width, 1, width // 2, count_include_pad=False)[0] + 1e-9  # (G,)
    depth = smooth / smooth.flip(0).cummax(0).values.flip(0)  # relative to the highest that follows
    depth[: int(smooth.argmax())] = 1
    valley = int(depth.argmin())
    reach = torch.arange(min(valley + 1, len(density) - valley))
    first = torch.zeros_like(smooth)
    continued = smooth[valley] ** 2 / smooth[valley - reach] / 2  # half of the density at the valley
    first[valley + reach] = torch.minimum(continued, smooth[valley + reach])
    precision = 1 - first.flip(0).cumsum(0).flip(0) / smooth.flip(0).cumsum(0).flip(0)
    precision[:valley] = 0
    return precision.cummax(0).values if depth[valley] < 0.5 else torch.zeros_like(smooth)


def _partitions(rows: Tensor, drawn: torch.Generator) -> Tensor:
    """The cluster of each row (N, D) in partitions of `FINE` and `COARSE` sizes, (K, N) int64."""
    sample = rows[torch.randperm(len(rows), generator=drawn)[:PATCHES]]
    sizes = Bar((*FINE, *COARSE), desc="partitions")
    return torch.stack([assign(rows, kmeans(sample, size, drawn)) for size in sizes])


def _adjacent(images: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity of all adjacent patches, (M,), and whether each partition puts them together, (K, M)."""
    right = (images[:, :, 1:] * images[:, :, :-1]).sum(dim=3), parts[..., 1:] == parts[..., :-1]
    below = (images[:, 1:] * images[:, :-1]).sum(dim=3), parts[:, :, 1:] == parts[:, :, :-1]
    near, together = zip(right, below, strict=True)
    return torch.cat([each.flatten() for each in near]), torch.cat([each.flatten(1) for each in together], 1)


def cluster_agreement(features: Tensor, seed: int) -> Tensor:
    """Stability of k-means with `SIZES` clusters, (RESAMPLES, sizes); every k-th patch of (P, D, h, w)."""
    images = F.normalize(features.flatten(2).transpose(1, 2), dim=2)  # (P, h*w, D)
    images = images[:, :: max(1, 2 * images[..., 0].numel() // PATCHES)]
    draws = [generator(seed, "halves", number) for number in range(RESAMPLES)]
    return torch.tensor([stability(images, SIZES, drawn) for drawn in Bar(draws, desc="clusters")])


def set_shares(
    features: Tensor, criterion: PPAPLoss, boundaries: Boundaries, *, batch: int, drawn: torch.Generator
) -> list[dict[str, float]]:
    """Percent of the bank in each set after t = 0..T relocations, mean over sampled anchors."""
    totals: Tensor | float = 0.0
    banks = len(features) // batch
    for number in range(banks):
        bank = criterion.bank(features[number * batch : (number + 1) * batch])  # (N, D)
        anchors = criterion.sample_anchors(len(bank), drawn)
        anchors = anchors[anchors >= 0]
        anchors = anchors[torch.randperm(len(anchors), generator=drawn)[: ANCHORS // banks]]
        classes = torch.zeros(len(bank), dtype=torch.int64)  # unknown
        for part in anchors.split(CHUNK):
            totals = totals + set_quality(bank, classes, part, boundaries)
    return [{name: row[name] for name in ("positives", "ambiguous", "negatives")} for row in means(totals)]
