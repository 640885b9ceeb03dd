from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.evaluator import CLUSTER_ALPHA, Evaluator
from model.probes import ClusterProbe, LinearProbe
from tests.conftest import needs_pydensecrf
from utils.vision.crf import refine
from utils.vision.mean_field import MeanField


@pytest.fixture
def batch():
    drawn = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    return {
        "code": torch.randn(2, 12, 5, 6, generator=drawn),
        "image": torch.randint(256, (2, 3, 40, 48), generator=drawn, dtype=torch.uint8),
        "label": torch.randint(-1, 3, (2, 40, 48), generator=drawn) % 256,
        "linear": LinearProbe(12, 3),
        "cluster": ClusterProbe(12, 4),
    }


def add(evaluator, batch, first=0):
    probes = {"linear": batch["linear"], "cluster": batch["cluster"]}
    evaluator.update(batch["code"], batch["image"], batch["label"], first=first, **probes)


def upsampled(batch):
    """The upsampled code, (B, D, H, W), and its cosines to the centroids, (B, K, H, W)."""
    full = F.interpolate(batch["code"], size=(40, 48), mode="bilinear")
    centroids = F.normalize(batch["cluster"].clusters, dim=1)[:, :, None, None]
    return full, F.conv2d(F.normalize(full, dim=1), centroids)


def test_update__equals_probes_on_the_upsampled_code(batch):
    """The literal order of the published evaluation: upsample the code, then apply the probes."""
    evaluator = Evaluator(3, 4, is_direct=False, with_linear=True)
    add(evaluator, batch)
    (full, cosine), label = upsampled(batch), batch["label"]
    for name, prediction in (("cluster", cosine.argmax(1)), ("linear", batch["linear"](full).argmax(1))):
        expected = torch.zeros(*evaluator.shapes[name], dtype=torch.int64)
        for true, predicted in zip(label[label < 3].tolist(), prediction[label < 3].tolist(), strict=True):
            expected[true, predicted] += 1
        assert (evaluator.plain[name] - expected).abs().sum() <= 2  # ties
    assert evaluator.compute().valid_loss == pytest.approx(-cosine.max(1).values.mean().item(), abs=1e-5)


def test_update__images_count_equally_in_batches_of_any_size(batch):
    apart, mixed = (Evaluator(3, 4, is_direct=False, with_linear=True) for _ in range(2))
    first, second = (
        {k: v[[place]] if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for place in (0, 1)
    )
    for evaluator, parts in ((apart, (first, second, first)), (mixed, (batch, first))):
        for part in parts:
            add(evaluator, part)
    for name in ("cluster", "linear"):
        difference = mixed.plain[name] - apart.plain[name]
        assert difference.abs().sum() <= 2  # ties
    assert mixed.compute().images == apart.compute().images == 3
    assert mixed.compute().valid_loss == pytest.approx(apart.compute().valid_loss, abs=1e-6)


def test_predictions__are_kept_of_the_images_asked_for(batch):
    evaluator = Evaluator(3, 4, is_direct=False, with_linear=True, pictured=(1, 4))
    for first in (0, 2, 4):
        add(evaluator, batch, first)
    kept = evaluator.predictions()
    assert [prediction.index for prediction in kept] == [1, 4]
    assert torch.equal(kept[0].image, batch["image"][1])
    assert torch.equal(kept[1].image, batch["image"][0])


def test_direct__code_is_the_cluster_logits(batch):
    evaluator = Evaluator(3, 12, is_direct=True, with_linear=False)
    add(evaluator, batch)
    full = F.interpolate(batch["code"], size=(40, 48), mode="bilinear").argmax(1)
    label = batch["label"]
    assert evaluator.plain["cluster"][1, 5] == ((full == 5) & (label == 1)).sum()
    assert "linear" not in evaluator.compute().scores


def test_crf__literal_logits_reach_the_workers(batch):
    """log-softmax of the linear logits, and of twice the cosines of the upsampled code."""
    seen = []
    refiner = SimpleNamespace(on_device=False, most_pending=2, refine=lambda *given: seen.append(given))
    evaluator = Evaluator(3, 4, is_direct=False, with_linear=True, refiner=refiner)
    with torch.no_grad():
        add(evaluator, batch)
        full, cosine = upsampled(batch)
        expected = (CLUSTER_ALPHA * cosine, batch["linear"](full))
    for place, (image, heads) in enumerate(seen):
        assert image.shape == (40, 48, 3)
        for head, literal in zip(heads, expected, strict=True):
            np.testing.assert_allclose(head.at((40, 48)), literal[place].numpy(), atol=1e-4)


class InProcess:
    """What CrfPool does, without processes."""

    on_device, most_pending = False, 1

    def refine(self, image, heads):
        done = Future()
        done.set_result([marginals.argmax(0) for marginals in refine(image, heads)])
        return done


@needs_pydensecrf
@pytest.mark.parametrize(("is_direct", "with_linear"), [(False, True), (True, True), (False, False)])
def test_crf__on_the_device_equals_the_pool(batch, is_direct, with_linear):
    n_clusters, flags = 12 if is_direct else 4, {"is_direct": is_direct, "with_linear": with_linear}
    in_pool, on_device = (
        Evaluator(3, n_clusters, refiner=refiner, **flags) for refiner in (InProcess(), MeanField())
    )
    for evaluator in (in_pool, on_device):
        add(evaluator, batch)
        evaluator.finish_refining()
    for name in ("cluster", "linear") if with_linear else ("cluster",):
        difference = on_device.refined[name] - in_pool.refined[name]
        assert difference.abs().sum() <= 4  # ties
        assert on_device.refined[name].sum() == (batch["label"] < 3).sum()
