"""The part of an evaluation after the network, and CRF refinement."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from model.evaluator import CLUSTER_ALPHA, Evaluator
from model.probes import ClusterProbe, LinearProbe
from tests.benchmarks import literal
from tests.benchmarks.inputs import n_classes_of, scene, shape_options
from tests.benchmarks.measure import Bench, Row
from utils.training.launch import cores
from utils.vision.crf import CrfPool, HeadLogits, crf_missing
from utils.vision.mean_field import MeanField

EVALUATED = {"cpu": 4, "cuda": 16}  # images in a batch; the literal form upsamples all channels
REFINED = max(12, 2 * cores())  # images


def bench_eval(bench: Bench, shape: str) -> list[Row]:
    """From the code to predictions, cosines and confusion matrices of both heads."""
    options = shape_options(shape)
    n_classes, dim, res = n_classes_of(options), options.model.dim, options.dataset.val_res
    images, side = EVALUATED[bench.device.type], res // options.model.pretrained.dino_patch_size
    drawn = torch.Generator().manual_seed(0)
    code = torch.randn(images, dim, side, side, generator=drawn).to(bench.device)
    label = torch.randint(-1, n_classes, (images, res, res), generator=drawn).to(bench.device) % 256
    linear = LinearProbe(dim, n_classes).to(bench.device)
    cluster = ClusterProbe(dim, n_classes).to(bench.device)
    evaluator = Evaluator(n_classes, n_classes, is_direct=False, with_linear=True).to(bench.device)
    counts = {name: np.zeros((n_classes, n_classes), dtype=np.int64) for name in ("linear", "cluster")}

    @torch.no_grad()
    def by_definition() -> None:
        found = literal.predictions(code, (res, res), linear=linear, centroids=cluster.clusters)
        for name, count in counts.items():
            literal.confusion(found[name], label, count)
        float(-found["cosines"].amax(dim=1).mean())

    def ours() -> None:
        evaluator.reset()
        evaluator.update(code, None, label, linear=linear, cluster=cluster, first=0)
        evaluator.compute()

    return bench.compare("eval", {"literal": by_definition, "ours": ours}, items=images)


def unrefined(number: int, n_classes: int, *, side: int, res: int) -> tuple[np.ndarray, list[HeadLogits]]:
    """A scene (H, W, 3) uint8 and smooth logits of both heads on the patch grid."""
    coarse = torch.randn(2, n_classes, 6, 6, generator=torch.Generator().manual_seed(number))
    inner, logits = F.interpolate(coarse, size=(side, side), mode="bilinear").numpy()
    norm = np.full((res, res), 1.5, dtype=np.float32)
    image = np.asarray(scene(number, (res, res), n_classes)[0])
    return image, [HeadLogits(CLUSTER_ALPHA * inner, norm), HeadLogits(logits)]


def bench_crf(bench: Bench, shape: str) -> list[Row]:
    """Both heads of a few images: a lattice per head; a lattice per image, in one and in all processes."""
    if (missing := crf_missing()) is not None:
        print(f"crf: not measured, {missing}")
        return []
    options = shape_options(shape)
    res, side = options.dataset.val_res, options.dataset.val_res // options.model.pretrained.dino_patch_size
    items = [unrefined(number, n_classes_of(options), side=side, res=res) for number in range(REFINED)]

    def moved(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else torch.tensor(array, device=bench.device)

    tensors = [
        (moved(image), [HeadLogits(moved(head.logits), moved(head.divisor)) for head in heads])
        for image, heads in items
    ]

    def by_definition() -> None:
        for image, heads in items:
            for head in heads:
                literal.crf(image, head.at(image.shape[:2])).argmax(axis=0)

    def submitted(refiner: CrfPool | MeanField, images: list) -> None:
        for image, heads in images:
            refiner.submit(image, heads, None)
        while len(refiner):
            list(refiner.finished(wait_for_one=True))

    with CrfPool(1) as single, CrfPool() as pool:
        forms = {
            "literal": by_definition,
            "ours, 1 process": lambda: submitted(single, items),
            f"ours, {pool.workers} processes": lambda: submitted(pool, items),
            f"ours, torch on {bench.device.type}": lambda: submitted(MeanField(), tensors),
        }
        return bench.compare("crf", forms, items=len(items))
