"""The part of an evaluation after the network, and CRF refinement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dataset import DATA_SETS
from model.evaluator import CLUSTER_ALPHA, Evaluator
from model.probes import ClusterProbe, LinearProbe
from tests.benchmarks import literal
from tests.benchmarks.inputs import scene, shape_options
from tests.benchmarks.measure import Bench, Cost, Row
from utils.crf import CrfPool, HeadLogits, crf_missing, refine
from utils.meanfield import MeanField
from utils.upsampling import upsample

EVALUATED = {"cpu": 4, "cuda": 16}  # images in a batch; the literal form upsamples all channels
REFINED = 8


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


def head_logits(number: int, n_classes: int, side: int, res: int) -> list[HeadLogits]:
    """Smooth logits of both heads on the patch grid."""
    drawn = torch.Generator().manual_seed(number)
    coarse = torch.randn(2, n_classes, 6, 6, generator=drawn)
    inner, logits = F.interpolate(coarse, size=(side, side), mode="bilinear").numpy()
    norm = np.full((res, res), 1.5, dtype=np.float32)
    return [HeadLogits(CLUSTER_ALPHA * inner, norm), HeadLogits(logits)]


def bench_crf(bench: Bench, shape: str) -> list[Row]:
    """Both heads of a few images: serially with a lattice a head, with one lattice, in all processes."""
    if (missing := crf_missing()) is not None:
        print(f"crf: not measured, {missing}")
        return []
    options = shape_options(shape)
    n_classes = DATA_SETS[options.dataset.data_type].labels(options.dataset).n_classes
    res, side = options.dataset.val_res, options.dataset.val_res // options.model.pretrained.dino_patch_size
    images = [np.asarray(scene(number, (res, res), n_classes)[0]) for number in range(REFINED)]
    heads = [head_logits(number, n_classes, side, res) for number in range(REFINED)]

    def literally() -> None:
        for image, pair in zip(images, heads, strict=True):
            for head in pair:
                full = upsample(head.logits, (res, res))
                literal.crf(image, full if head.divisor is None else full / head.divisor).argmax(axis=0)

    def shared() -> None:
        for image, pair in zip(images, heads, strict=True):
            [marginal.argmax(axis=0) for marginal in refine(image, pair)]

    shown = [torch.tensor(image, device=bench.device) for image in images]
    given = [
        [
            HeadLogits(
                *(x if x is None else torch.tensor(x, device=bench.device) for x in vars(head).values())
            )
            for head in pair
        ]
        for pair in heads
    ]

    def on_device() -> None:
        field = MeanField()
        for image, pair in zip(shown, given, strict=True):
            field.submit(image, pair, None)
        list(field.finished())

    with CrfPool() as pool:

        def pooled() -> None:
            for image, pair in zip(images, heads, strict=True):
                pool.submit(image, pair, None)
            while len(pool):
                list(pool.finished(wait_for_one=True))

        forms: dict[str, Callable[[], Any]] = {
            "literal": literally,
            "one lattice an image": shared,
            f"ours, {pool.workers} processes": pooled,
            f"ours, torch on {bench.device.type}": on_device,
        }
        rows = bench.compare("crf", forms, items=REFINED)
    sharing = rows[0].seconds / rows[1].seconds
    print(
        f"crf: {pool.workers} processes x {sharing:.2f} (one lattice) = {pool.workers * sharing:.2f} at best"
    )
    return rows
