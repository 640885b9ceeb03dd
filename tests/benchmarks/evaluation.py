"""The part of an evaluation after the network."""

from __future__ import annotations

import numpy as np
import torch

from model.evaluator import Evaluator
from model.probes import ClusterProbe, LinearProbe
from tests.benchmarks import literal
from tests.benchmarks.inputs import n_classes_of, shape_options
from tests.benchmarks.measure import Bench, Row

EVALUATED = {"cpu": 4, "cuda": 16}  # images in a batch; the literal form upsamples all channels


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
    evaluator = Evaluator(n_classes, n_classes, is_direct=False, with_linear=True)
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
