"""From the code of a batch to predictions, confusion matrices and CRF refinement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.probes import ClusterProbe, LinearProbe
from utils.crf import CrfPool, HeadLogits
from utils.meanfield import MeanField
from utils.metrics import ConfusionMatrix, Scores, score
from utils.transforms import normalise, to_eight_bit
from utils.upsampling import bilinear_taps

HEADS = ("cluster", "linear")
CLUSTER_ALPHA = 2.0  # scale of the cosines whose softmax is the CRF's unary term


@dataclass(frozen=True)
class Prediction:
    """One image as evaluated: uint8 (3, H, W), and class or cluster maps (H, W); cluster ids unmatched."""

    image: Tensor
    label: Tensor
    cluster: Tensor
    linear: Tensor | None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a whole set; None for a head that was not trained or a set without labels.

    Attributes:
        cluster: the cluster probe, matched by the Hungarian method.
        linear: the linear probe.
        valid_loss: mean over batches of the cluster loss on the upsampled code.
        images: how many were seen.
    """

    cluster: Scores | None
    linear: Scores | None
    valid_loss: float
    images: int

    def heads(self) -> dict[str, Scores]:
        """The scores that exist, by head."""
        both = {"cluster": self.cluster, "linear": self.linear}
        return {head: scores for head, scores in both.items() if scores is not None}

    def metrics(self) -> dict[str, float]:
        """The four metrics under their published names, of those that exist."""
        found = {}
        for head, scores in self.heads().items():
            name = head.capitalize()
            found |= {f"{name}_mIoU": scores.miou, f"{name}_Accuracy": scores.accuracy}
        return found


class Evaluator(nn.Module):
    """Collects an evaluation batch by batch; one for training's validations and the final evaluation.

    Args:
        n_classes: number of classes.
        n_clusters: K of the cluster probe.
        is_direct: the code itself holds the cluster logits.
        with_linear: whether a linear probe was trained.
    """

    def __init__(self, n_classes: int, n_clusters: int, *, is_direct: bool, with_linear: bool) -> None:
        super().__init__()
        self.is_direct, self.with_linear = is_direct, with_linear
        shapes = {"cluster": n_clusters, "linear": n_classes}
        self.plain = nn.ModuleDict({name: ConfusionMatrix(n_classes, k) for name, k in shapes.items()})
        self.refined = nn.ModuleDict({name: ConfusionMatrix(n_classes, k) for name, k in shapes.items()})
        self.pool: CrfPool | MeanField | None = None
        self.pictured: frozenset[int] = frozenset()  # places in the set of the images to keep
        self.reset()

    def reset(self) -> None:
        """Forgets all that was counted."""
        for metric in (*self.plain.values(), *self.refined.values()):
            metric.reset()
        self.losses: list[Tensor] = []
        self.images = 0
        self.pictures: list[Prediction] = []

    @torch.no_grad()
    def update(
        self, code: Tensor, image: Tensor | None, label: Tensor, *, linear: LinearProbe, cluster: ClusterProbe
    ) -> None:
        """Adds a batch.

        Args:
            code: (B, D, h, w).
            image: (B, 3, H, W) uint8, as loaded; None where neither pictures nor CRF are wanted.
            label: (B, H, W) int64, -1 = ignore.
            linear: the linear probe.
            cluster: the cluster probe.
        """
        size = label.shape[-2:]
        with torch.autocast(code.device.type, enabled=False):
            code = code.float()
            inner = code if self.is_direct else cluster.inner(code)  # (B, K, h, w)
            logits = linear(code) if self.with_linear else None  # (B, C, h, w)
        norm = None if self.is_direct else upsampled_norm(code, size)  # (B, H, W)
        best = F.interpolate(inner, size=size, mode="bilinear").max(dim=1)  # (B, H, W)
        predicted = {"cluster": best.indices}
        if logits is not None:
            predicted["linear"] = F.interpolate(logits, size=size, mode="bilinear").argmax(dim=1)
        for name, prediction in predicted.items():
            self.plain[name].update(prediction, label)
        self.losses.append(-(best.values if norm is None else best.values / norm).mean())
        if self.pictured:
            self._keep_pictures(predicted, image=image, label=label)
        self.images += len(label)
        if self.pool is not None:
            self._refine(inner, norm, logits=logits, image=image, label=label)

    def _keep_pictures(self, predicted: dict[str, Tensor], *, image: Tensor, label: Tensor) -> None:
        for place in range(len(image)):
            if self.images + place in self.pictured:
                maps = [predicted[name][place].cpu() if name in predicted else None for name in HEADS]
                self.pictures.append(Prediction(image[place].cpu(), label[place].cpu(), *maps))

    def _refine(
        self, inner: Tensor, norm: Tensor | None, *, logits: Tensor | None, image: Tensor, label: Tensor
    ) -> None:
        shown = to_eight_bit(normalise(image)).permute(0, 2, 3, 1)  # (B, H, W, 3)
        scale = 1.0 if norm is None else CLUSTER_ALPHA
        maps = [shown, inner * scale, norm, logits]
        if not isinstance(self.pool, MeanField):  # to other processes
            maps = [None if t is None else t.cpu().numpy() for t in maps]
            label = label.cpu()
        for place in range(len(label)):
            picture, cosine, divisor, linear = (None if t is None else t[place] for t in maps)
            heads = [HeadLogits(cosine, divisor)]
            if linear is not None:
                heads.append(HeadLogits(linear))
            self.pool.submit(picture, heads, tag=label[place])
        self.collect_refined()

    def collect_refined(self, *, wait_for_one: bool = False) -> int:
        """Counts what the CRF has finished; returns how many images are still with its processes."""
        for label, predictions in self.pool.finished(wait_for_one=wait_for_one):
            for name, prediction in zip(HEADS, predictions, strict=False):
                metric = self.refined[name]
                metric.update(*(t.to(metric.counts.device) for t in (torch.as_tensor(prediction), label)))
        return len(self.pool)

    def compute(self, *, refined: bool = False) -> Evaluation:
        """Scores of what was added, before or after CRF."""
        counts = {
            name: metric.compute().cpu() for name, metric in (self.refined if refined else self.plain).items()
        }
        loss = float(torch.stack(self.losses).mean()) if self.losses else float("nan")
        return Evaluation(
            cluster=score(counts["cluster"], matched=True),
            linear=score(counts["linear"], matched=False) if self.with_linear else None,
            valid_loss=loss,
            images=self.images,
        )


def upsampled_norm(code: Tensor, size: tuple[int, int]) -> Tensor:
    """Norm of the bilinearly upsampled code, without ever making the (D, H, W) map.

    A target pixel is a weighted sum of four neighbours, so its squared norm follows from their inner
    products, which are five maps on the patch grid.

    Args:
        code: (B, D, h, w) float32.
        size: (H, W).

    Returns:
        (B, H, W) float32, at least 1e-12.
    """
    rows, columns = bilinear_taps(code.shape[2], size[0]), bilinear_taps(code.shape[3], size[1])
    below = code[:, :, _following(code.shape[2])]  # (B, D, h, w), each patch's lower neighbour
    right = code[..., _following(code.shape[3])]
    diagonal = below[..., _following(code.shape[3])]

    def inner(a: Tensor, b: Tensor, row: np.ndarray, column: np.ndarray) -> Tensor:
        product = (a * b).sum(dim=1)  # (B, h, w)
        return product[:, torch.from_numpy(row)][..., torch.from_numpy(column)]  # (B, H, W)

    y = torch.from_numpy(rows.weight).to(code)[:, None]  # (H, 1)
    x = torch.from_numpy(columns.weight).to(code)  # (W,)
    top, bottom, left, end = rows.low, rows.high, columns.low, columns.high
    upper = (1 - x) ** 2 * inner(code, code, top, left) + x**2 * inner(code, code, top, end)
    upper = upper + 2 * x * (1 - x) * inner(code, right, top, left)
    lower = (1 - x) ** 2 * inner(code, code, bottom, left) + x**2 * inner(code, code, bottom, end)
    lower = lower + 2 * x * (1 - x) * inner(code, right, bottom, left)
    across = (1 - x) ** 2 * inner(code, below, top, left) + x**2 * inner(code, below, top, end)
    across = across + x * (1 - x) * (inner(code, diagonal, top, left) + inner(right, below, top, left))
    square = (1 - y) ** 2 * upper + y**2 * lower + 2 * y * (1 - y) * across  # (B, H, W)
    return square.clamp_min(1e-24).sqrt()


def _following(length: int) -> Tensor:
    return torch.arange(1, length + 1).clamp_max(length - 1)
