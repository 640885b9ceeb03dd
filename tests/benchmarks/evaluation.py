"""The part of an evaluation after the network, and CRF refinement."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from dataset import DATA_SETS
from model.evaluator import CLUSTER_ALPHA, Evaluator
from model.probes import ClusterProbe, LinearProbe
from tests.benchmarks import literal
from tests.benchmarks.inputs import scene, shape_options
from tests.benchmarks.measure import Bench, Cost, Row
from utils.training.launch import cores
from utils.vision.crf import CrfPool, HeadLogits, crf_missing, upsample
from utils.vision.mean_field import MeanField

EVALUATED = {"cpu": 4, "cuda": 16}  # images in a batch; the literal form upsamples all channels
REFINED = 12  # images, and at least two for each process: an end at which some are idle weighs little


def bench_eval(bench: Bench, shape: str) -> list[Row]:
    """From the code to predictions, cosines and confusion matrices of both heads."""
    options = shape_options(shape)
    labels = DATA_SETS[options.dataset.data_type].labels(options.dataset)
    n_classes, dim, res = labels.n_classes, options.model.dim, options.dataset.val_res
    images, side = EVALUATED[bench.device.type], res // options.model.pretrained.dino_patch_size
    drawn = torch.Generator().manual_seed(0)
    code = torch.randn(images, dim, side, side, generator=drawn).to(bench.device)
    label = torch.randint(-1, n_classes, (images, res, res), generator=drawn).to(bench.device)
    linear = LinearProbe(dim, n_classes).to(bench.device)
    cluster = ClusterProbe(dim, n_classes).to(bench.device)
    evaluator = Evaluator(n_classes, n_classes, is_direct=False, with_linear=True).to(bench.device)
    counts = {name: np.zeros((n_classes, n_classes), dtype=np.int64) for name in ("linear", "cluster")}

    @torch.no_grad()
    def literally() -> None:
        found = literal.predictions(code, (res, res), linear=linear, centroids=cluster.clusters)
        for name, count in counts.items():
            literal.confusion(found[name], label, count)
        float(-found["cosines"].amax(dim=1).mean())

    def ours() -> None:
        evaluator.reset()
        evaluator.update(code, None, label, linear=linear, cluster=cluster)
        evaluator.compute()

    patches, pixels, heads = images * side * side, images * res * res, 2 * n_classes
    operations = 2.0 * patches * dim * heads + 8.0 * pixels * heads  # both probes; four neighbours a pixel
    cost = Cost(operations, 4.0 * code.numel() + 8.0 * label.numel())
    return bench.compare("eval", {"literal": literally, "ours": ours}, costs={"ours": [cost]}, items=images)


@dataclass(frozen=True)
class Unrefined:
    """An image (H, W, 3) uint8 and the logits of both its heads."""

    image: np.ndarray
    heads: list[HeadLogits]

    def on(self, device: torch.device) -> tuple[torch.Tensor, list[HeadLogits]]:
        """The same as tensors."""

        def moved(array: np.ndarray | None) -> torch.Tensor | None:
            return None if array is None else torch.tensor(array, device=device)

        heads = [HeadLogits(moved(head.logits), moved(head.divisor)) for head in self.heads]
        return moved(self.image), heads


def unrefined(number: int, n_classes: int, *, side: int, res: int) -> Unrefined:
    """A scene with smooth logits on the patch grid."""
    coarse = torch.randn(2, n_classes, 6, 6, generator=torch.Generator().manual_seed(number))
    inner, logits = F.interpolate(coarse, size=(side, side), mode="bilinear").numpy()
    norm = np.full((res, res), 1.5, dtype=np.float32)
    image = np.asarray(scene(number, (res, res), n_classes)[0])
    return Unrefined(image, [HeadLogits(CLUSTER_ALPHA * inner, norm), HeadLogits(logits)])


def literal_crf(items: list[Unrefined]) -> None:
    """One image after another, one head after another."""
    for item in items:
        for head in item.heads:
            full = upsample(head.logits, item.image.shape[:2])
            literal.crf(item.image, full if head.divisor is None else full / head.divisor).argmax(axis=0)


def pooled_crf(items: list[Unrefined], pool: CrfPool) -> None:
    """All images through the processes of an evaluation."""
    for item in items:
        pool.submit(item.image, item.heads, None)
    while len(pool):
        list(pool.finished(wait_for_one=True))


def device_crf(items: list[tuple[torch.Tensor, list[HeadLogits]]]) -> None:
    """One image after another by eval.crf_backend torch."""
    field = MeanField()
    for image, heads in items:
        field.submit(image, heads, None)
    list(field.finished())


def bench_crf(bench: Bench, shape: str) -> list[Row]:
    """Both heads of a few images: a lattice a head; a lattice an image, in one and in all processes."""
    if (missing := crf_missing()) is not None:
        print(f"crf: not measured, {missing}")
        return []
    options = shape_options(shape)
    n_classes = DATA_SETS[options.dataset.data_type].labels(options.dataset).n_classes
    res, side = options.dataset.val_res, options.dataset.val_res // options.model.pretrained.dino_patch_size
    items = [unrefined(number, n_classes, side=side, res=res) for number in range(max(REFINED, 2 * cores()))]
    moved = [item.on(bench.device) for item in items]
    with CrfPool(1) as single, CrfPool() as pool:
        forms = {
            "literal": partial(literal_crf, items),
            "ours, 1 process": partial(pooled_crf, items, single),
            f"ours, {pool.workers} processes": partial(pooled_crf, items, pool),
            f"ours, torch on {bench.device.type}": partial(device_crf, moved),
        }
        rows = bench.compare("crf", forms, items=len(items))
    print(f"crf: {pool.workers} processes are {rows[1].seconds / rows[2].seconds:.2f} times as fast as one")
    return rows
