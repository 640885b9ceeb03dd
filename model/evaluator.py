"""From the code of a batch to predictions, confusion matrices and CRF refinement."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.probes import ClusterProbe, LinearProbe, read_both
from utils.config.options import Options
from utils.training.distributed import all_gather_object
from utils.training.launch import cores, is_rank_zero
from utils.vision.crf import CrfPool, HeadLogits, crf_missing, resolve_backend
from utils.vision.mean_field import MeanField
from utils.vision.metrics import ConfusionMatrix, Scores, score
from utils.vision.transforms import normalise, to_eight_bit
from utils.vision.upsampling import upsampled_argmax, upsampled_norm

HEADS = ("cluster", "linear")
CLUSTER_ALPHA = 2.0  # scale of the cosines whose softmax is the CRF's unary term


@dataclass(frozen=True)
class Prediction:
    """One evaluated image, uint8 (3, H, W), with its label and class or cluster maps (H, W).

    Cluster ids are unmatched; the image is None if the network was given cached tokens; `index` is that in
    the set.
    """

    index: int
    image: Tensor | None
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


class Refiner(Protocol):
    """CRF refinement of single images: `utils.vision.crf.CrfPool` or `utils.vision.mean_field.MeanField`."""

    on_device: bool  # whether images and logits stay tensors on the network's device

    def submit(self, image: Any, heads: Sequence[HeadLogits], tag: Any) -> None:
        """Queues an image (H, W, 3) uint8 with the logits of its heads."""

    def finished(self, *, wait_for_one: bool = False) -> Iterator[tuple[Any, Sequence[Any]]]:
        """(tag, predictions (H, W) per head) of the images that are done."""

    def __len__(self) -> int: ...


def open_refiner(options: Options) -> AbstractContextManager[Refiner]:
    """The CRF that `eval.crf_backend` selects."""
    if resolve_backend(options.eval.crf_backend) == "torch":
        return nullcontext(MeanField())
    share = max(1, cores() // options.trainer.devices)  # each rank of a machine has its own pool
    return CrfPool(options.eval.crf_workers or share)


def no_refiner_reason(options: Options, *, labelled: bool) -> str | None:
    """Why an evaluation cannot score a CRF, or None."""
    if not options.eval.is_crf:
        return "eval.is_crf is false"
    if not labelled:
        return "the validation split has no labels"
    return crf_missing() if options.eval.crf_backend == "pydensecrf" else None


class Evaluator(nn.Module):
    """Collects an evaluation batch by batch, for validations while training and for the final evaluation.

    With several ranks each adds its own batches; `compute` returns the scores of all.

    Args:
        n_classes: number of classes.
        n_clusters: K of the cluster probe.
        is_direct: the code itself holds the cluster logits.
        with_linear: whether a linear probe was trained.
        pictured: indices of the images whose predictions are kept.
        refiner: CRF whose refined predictions are scored as well, or None.
    """

    def __init__(
        self,
        n_classes: int,
        n_clusters: int,
        *,
        is_direct: bool,
        with_linear: bool,
        pictured: Collection[int] = (),
        refiner: Refiner | None = None,
    ) -> None:
        super().__init__()
        self.is_direct, self.with_linear = is_direct, with_linear
        self.pictured, self.refiner = frozenset(pictured), refiner
        shapes = {"cluster": n_clusters, "linear": n_classes}
        self.plain = nn.ModuleDict({name: ConfusionMatrix(n_classes, k) for name, k in shapes.items()})
        self.refined = nn.ModuleDict({name: ConfusionMatrix(n_classes, k) for name, k in shapes.items()})
        self.reset()

    def reset(self) -> None:
        """Clears all counts and kept predictions."""
        for metric in (*self.plain.values(), *self.refined.values()):
            metric.reset()
        self.losses: list[Tensor] = []
        self.images = 0
        self._predictions: list[Prediction] = []

    @torch.no_grad()
    def update(
        self,
        code: Tensor,
        image: Tensor | None,
        label: Tensor,
        *,
        linear: LinearProbe,
        cluster: ClusterProbe,
        first: int,
    ) -> None:
        """Adds a batch.

        Args:
            code: (B, D, h, w).
            image: (B, 3, H, W) uint8; None if the network was given cached tokens.
            label: (B, H, W) int64; values outside [0, n_classes) are ignored.
            linear: the linear probe.
            cluster: the cluster probe.
            first: index in the set of the batch's first image.
        """
        size = label.shape[-2:]
        with torch.autocast(code.device.type, enabled=False):
            code = code.float()
            heads = self.heads(code, linear=linear, cluster=cluster)
            norm = None if self.is_direct else upsampled_norm(code, size)  # (B, H, W)
        best = {name: upsampled_argmax(logits, size) for name, logits in heads.items()}
        predicted = {name: indices for name, (_, indices) in best.items()}
        for name, prediction in predicted.items():
            self.plain[name].update(prediction, label)
        largest, _ = best["cluster"]
        self.losses.append(-(largest if norm is None else largest / norm).mean())
        self._keep_predictions(predicted, image=image, label=label, first=first)
        self.images += len(label)
        if self.refiner is not None:
            self._refine(heads, norm, image=image, label=label)

    def heads(self, code: Tensor, *, linear: LinearProbe, cluster: ClusterProbe) -> dict[str, Tensor]:
        """Logits on the patch grid, (B, K, h, w) and (B, C, h, w), of the heads that exist."""
        if self.with_linear and not self.is_direct:
            return read_both(code, linear=linear, cluster=cluster)
        heads = {"cluster": code if self.is_direct else cluster.inner(code)}
        return heads | ({"linear": linear(code)} if self.with_linear else {})

    def _keep_predictions(
        self, predicted: dict[str, Tensor], *, image: Tensor | None, label: Tensor, first: int
    ) -> None:
        for offset in range(len(label)):
            if first + offset in self.pictured:
                maps = [predicted[name][offset].cpu() if name in predicted else None for name in HEADS]
                shown = None if image is None else image[offset].cpu()
                self._predictions.append(Prediction(first + offset, shown, label[offset].cpu(), *maps))

    def _refine(self, heads: dict[str, Tensor], norm: Tensor | None, *, image: Tensor, label: Tensor) -> None:
        shown = to_eight_bit(normalise(image)).permute(0, 2, 3, 1)  # (B, H, W, 3)
        scale = 1.0 if norm is None else CLUSTER_ALPHA
        maps = [shown, scale * heads["cluster"], norm, heads.get("linear")]
        if not self.refiner.on_device:
            maps = [None if t is None else t.cpu().numpy() for t in maps]
            label = label.cpu()
        for offset in range(len(label)):
            picture, cosine, divisor, linear = (None if t is None else t[offset] for t in maps)
            given = [HeadLogits(cosine, divisor)]
            if linear is not None:
                given.append(HeadLogits(linear))
            self.refiner.submit(picture, given, tag=label[offset])
        self.collect_refined()

    def collect_refined(self, *, wait_for_one: bool = False) -> int:
        """Counts what the CRF has finished; returns the number of images that it still has."""
        for label, predictions in self.refiner.finished(wait_for_one=wait_for_one):
            for name, prediction in zip(HEADS, predictions, strict=False):
                metric = self.refined[name]
                metric.update(*(t.to(metric.counts.device) for t in (torch.as_tensor(prediction), label)))
        return len(self.refiner)

    def finish_refining(self) -> None:
        """Waits for the CRF, with a progress bar."""
        if self.refiner is None:
            return
        with tqdm(total=self.images, desc="CRF", unit="image", disable=not is_rank_zero()) as bar:
            bar.update(self.images - len(self.refiner))
            while waiting := len(self.refiner):
                bar.update(waiting - self.collect_refined(wait_for_one=True))

    def predictions(self) -> list[Prediction]:
        """The kept predictions of all ranks, in the order of the set. Must be called by all ranks."""
        kept = [prediction for each in all_gather_object(self._predictions) for prediction in each]
        return sorted(kept, key=lambda prediction: prediction.index)

    def compute(self, *, refined: bool = False) -> Evaluation:
        """Scores of everything added on all ranks, before or after CRF. Must be called by all ranks."""
        metrics = self.refined if refined else self.plain
        counts = {name: metric.compute().cpu() for name, metric in metrics.items()}
        losses = torch.stack(self.losses).cpu() if self.losses else torch.zeros(0)
        added = all_gather_object((counts, losses, self.images))
        counts = {name: sum(each[name] for each, _, _ in added) for name in counts}
        return Evaluation(
            cluster=score(counts["cluster"], matched=True),
            linear=score(counts["linear"], matched=False) if self.with_linear else None,
            valid_loss=float(torch.cat([each for _, each, _ in added]).mean()),  # NaN without images
            images=sum(images for _, _, images in added),
        )
