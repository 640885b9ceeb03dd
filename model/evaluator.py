"""From the code of a batch to predictions, confusion matrices and CRF refinement."""

from collections import deque
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from model.probes import ClusterProbe, LinearProbe, read_both
from utils.config.options import Options
from utils.progress import Bar
from utils.training.distributed import all_gather_object
from utils.training.launch import own_cores
from utils.vision.crf import CrfPool, HeadLogits, resolve_backend
from utils.vision.mean_field import MeanField
from utils.vision.metrics import Scores, confusion, score
from utils.vision.transforms import normalise, to_eight_bit
from utils.vision.upsampling import upsampled_argmax, upsampled_norm

HEADS = ("cluster", "linear")
CLUSTER_ALPHA = 2.0  # scale of the cosines whose softmax is the CRF's unary term
Refiner = CrfPool | MeanField


@dataclass(frozen=True)
class Prediction:
    """One evaluated image with its label and the maps of its heads, (H, W); cluster ids are unmatched."""

    index: int  # in the set
    image: Tensor | None  # (3, H, W) uint8; None if the network was given cached tokens
    label: Tensor
    cluster: Tensor
    linear: Tensor | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a whole set."""

    scores: dict[str, Scores]  # by head; only trained heads, none without labels
    valid_loss: float  # mean over images of the cluster loss on the upsampled code
    images: int

    @property
    def assignment(self) -> list[int] | None:
        """Class of each cluster, -1 for none; None without labels."""
        return list(self.scores["cluster"].assignment) if "cluster" in self.scores else None

    def metrics(self) -> dict[str, float]:
        """The four metrics under their published names, of the heads that have scores."""
        found = {}
        for head, scores in self.scores.items():
            name = head.capitalize()
            found |= {f"{name}_mIoU": scores.miou, f"{name}_Accuracy": scores.accuracy}
        return found


def open_refiner(options: Options) -> AbstractContextManager[Refiner]:
    """The CRF that `eval.crf_backend` selects."""
    if resolve_backend(options.eval.crf_backend) == "torch":
        return nullcontext(MeanField())
    # each rank of a machine has its own pool
    return CrfPool(options.eval.crf_workers or own_cores(options.trainer.devices))


class Evaluator:
    """Collects an evaluation batch by batch; each rank adds its own batches, `compute` scores those of all.

    With `is_direct`, the code itself holds the cluster logits. `pictured` are the indices of the images whose
    predictions are kept; the predictions of the CRF `refiner`, if there is one, are scored as well.
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
        self.is_direct, self.with_linear = is_direct, with_linear
        self.pictured, self.refiner = frozenset(pictured), refiner
        shapes = {"cluster": n_clusters} | ({"linear": n_classes} if with_linear else {})
        self.shapes = {name: (n_classes, k) for name, k in shapes.items()}  # of the counts of a head
        self.reset()

    def reset(self) -> None:
        """Clears all counts and kept predictions."""
        self.plain, self.refined = {}, {}  # counts by head
        self._losses, self._sizes, self._predictions = [], [], []  # by batch: mean loss, number of images
        self._pending: deque[tuple[Tensor, Future]] = deque()  # labels of images in the CRF

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
        """Adds a batch, whose first image has the index `first` in the set.

        Args:
            code: (B, D, h, w).
            image: (B, 3, H, W) uint8; None if the network was given cached tokens.
            label: (B, H, W) integer; values outside [0, n_classes) are ignored.
        """
        size = label.shape[-2:]
        with torch.autocast(code.device.type, enabled=False):
            code = code.float()
            heads = self.heads(code, linear=linear, cluster=cluster)
            norm = None if self.is_direct else upsampled_norm(code, size)  # (B, H, W)
        predicted = {}
        for name, logits in heads.items():
            largest, predicted[name] = upsampled_argmax(logits, size)  # (B, H, W)
            self._count(self.plain, name, predicted[name], label)
            if name == "cluster":
                self._losses.append(-(largest if norm is None else largest / norm).mean())
        for index in self.pictured.intersection(range(first, first + len(label))):
            batches = [image, label, predicted["cluster"], predicted.get("linear")]  # as in `Prediction`
            kept = [None if batch is None else batch[index - first].clone() for batch in batches]
            self._predictions.append((index, kept))
        self._sizes.append(len(label))
        if self.refiner is not None:
            self._refine(heads, norm, image=image, label=label)

    def heads(self, code: Tensor, *, linear: LinearProbe, cluster: ClusterProbe) -> dict[str, Tensor]:
        """Logits on the patch grid, (B, K, h, w) and (B, C, h, w), of the heads that exist."""
        if self.with_linear and not self.is_direct:
            return read_both(code, linear=linear, cluster=cluster)
        heads = {"cluster": code if self.is_direct else cluster.inner(code)}
        return heads | ({"linear": linear(code)} if self.with_linear else {})

    def _refine(self, heads: dict[str, Tensor], norm: Tensor | None, *, image: Tensor, label: Tensor) -> None:
        shown = to_eight_bit(normalise(image)).permute(0, 2, 3, 1)  # (B, H, W, 3)
        scale = 1.0 if norm is None else CLUSTER_ALPHA
        maps = [shown, scale * heads["cluster"], norm, heads.get("linear")]
        if not self.refiner.on_device:
            *maps, label = _to_cpu([*maps, label])
            maps = [None if t is None else t.numpy() for t in maps]
        for row in range(len(label)):
            picture, cosine, divisor, linear = (None if t is None else t[row] for t in maps)
            given = [HeadLogits(cosine, divisor)] + ([] if linear is None else [HeadLogits(linear)])
            self._pending.append((label[row], self.refiner.refine(picture, given)))
        while len(self._pending) > self.refiner.most_pending:
            self._count_refined()

    def _count_refined(self) -> None:
        label, refined = self._pending.popleft()
        for name, prediction in zip(self.shapes, refined.result(), strict=True):
            self._count(self.refined, name, torch.as_tensor(prediction), label)

    def _count(self, counts: dict[str, Tensor], name: str, prediction: Tensor, label: Tensor) -> None:
        counts[name] = counts.get(name, 0) + confusion(prediction, label, self.shapes[name])

    def finish_refining(self) -> None:
        """Waits for the CRF, with a progress bar."""
        if not self._pending:
            return
        for _ in Bar(range(len(self._pending)), desc="CRF", unit="image"):
            self._count_refined()

    def predictions(self) -> list[Prediction]:
        """The kept predictions of all ranks, in the order of the set. Must be called by all ranks."""
        own = [(index, _to_cpu(maps)) for index, maps in self._predictions]
        kept = [Prediction(index, *maps) for each in all_gather_object(own) for index, maps in each]
        return sorted(kept, key=lambda prediction: prediction.index)

    def compute(self, *, refined: bool = False) -> Evaluation:
        """Scores of everything added on all ranks, before or after CRF. Must be called by all ranks."""
        kept, zero = self.refined if refined else self.plain, torch.zeros(1, dtype=torch.int64)
        counts = {name: kept.get(name, zero).cpu().expand(shape) for name, shape in self.shapes.items()}
        losses = torch.stack(self._losses).cpu() if self._losses else torch.zeros(0)
        added = all_gather_object((counts, losses, torch.tensor(self._sizes)))
        totals = {name: sum(each[name] for each, _, _ in added) for name in counts}
        scores = {name: score(total, matched=name == "cluster") for name, total in totals.items()}
        losses, sizes = (torch.cat([each[place] for each in added]) for place in (1, 2))  # (batches,)
        return Evaluation(
            {name: found for name, found in scores.items() if found},
            # weights of 1 if all batches are full; NaN without images
            valid_loss=float((losses * (sizes / sizes.float().mean())).mean()),
            images=int(sizes.sum()),
        )


def _to_cpu(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Copies to the CPU; waits for a GPU once."""
    # not blocking: into pinned memory
    copies = [None if tensor is None else tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copies
