import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dataset.synthetic import Synthetic
from utils.config.options import DatasetOptions
from utils.vision import crf
from utils.vision.crf import HeadLogits, upsample
from utils.vision.mean_field import MeanField, refine
from utils.vision.transforms import to_eight_bit


def blobs(height, width, *, deviation=5.0, seed=0):
    """Coloured discs on shaded ground, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width, 3), 90.0) + 40 * np.sin(x / 50)[:, :, None]
    for _ in range(5):
        middle, radius = rng.uniform(0, (height, width)), rng.uniform(0.15, 0.4) * min(height, width)
        image[np.hypot(y - middle[0], x - middle[1]) < radius] = rng.uniform(0, 255, 3)
    return (image + rng.normal(0, deviation, image.shape)).clip(0, 255).astype(np.uint8)


def coarse(labels, height, width, *, seed=0):
    """Logits on a patch grid, (K, h, w) float32."""
    shape = (labels, max(height // 8, 1), max(width // 8, 1))
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def scene(side):
    options = DatasetOptions(val_res=side)
    return np.asarray(Synthetic(options, "val").read(0).image)


def refined(image, heads):
    full = [torch.from_numpy(upsample(head, image.shape[:2])) for head in heads]
    return refine(torch.from_numpy(image.copy()), full)


CASES = {
    "smooth": (blobs(96, 96), (27, 27)),
    "edges without noise": (blobs(96, 96, deviation=0, seed=1), (9, 9)),
    "textures": (scene(96), (9, 9)),
    "wide, one head": (blobs(90, 151, seed=2), (9,)),
    "tall, unequal heads": (blobs(120, 64, seed=3), (5, 8)),
    "noise": (np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), (6, 6)),
    "one colour": (np.full((40, 56, 3), 128, dtype=np.uint8), (4, 4)),
    "one pixel": (blobs(1, 1), (5,)),
}


@pytest.mark.parametrize("case", CASES)
def test_refine__equals_pydensecrf(case):
    pytest.importorskip("pydensecrf.densecrf")
    image, labels = CASES[case]
    heads = [coarse(k, *image.shape[:2], seed=seed) for seed, k in enumerate(labels)]
    theirs = crf.refine(image, [HeadLogits(head) for head in heads])
    for ours, expected in zip(refined(image, heads), theirs, strict=True):
        difference = np.abs(ours.numpy() - expected).max(axis=0)  # (H, W)
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours.sum(dim=0), torch.ones(image.shape[:2]))
        assert (ours.numpy().argmax(0) == expected.argmax(0)).mean() >= 0.999
        assert (difference > 1e-3).mean() <= 1e-3  # rounding at the border of two simplices
        assert difference.mean() < 1e-5


def test_refine__points_between_two_simplices_fall_as_in_pydensecrf():
    """A pixel of this scene lies within rounding of a border; on the other side, 80 pixels change."""
    pytest.importorskip("pydensecrf.densecrf")
    image, head = scene(320), coarse(9, 320, 320)
    expected = crf.refine(image, [HeadLogits(head)])[0]
    assert np.abs(refined(image, [head])[0].numpy() - expected).max() < 2e-4


def test_refine__golden(golden):
    stored = golden("crf")
    image = to_eight_bit(stored.image[None])[0].permute(1, 2, 0)
    full = F.interpolate(stored.logits[None], size=image.shape[:2], mode="bilinear")[0]
    marginals = refine(image, [full])[0]
    assert (marginals.argmax(0) == stored.argmax).float().mean() >= 0.999
    assert (marginals - stored.q).abs().max() < 1e-3


@pytest.mark.parametrize("labels", [(27, 27), (40, 40, 40), (3, 70)])
def test_refine__heads_together_equal_heads_alone(labels):
    image = blobs(48, 56)
    heads = [coarse(k, 48, 56, seed=seed) for seed, k in enumerate(labels)]
    for together, head in zip(refined(image, heads), heads, strict=True):
        torch.testing.assert_close(together, refined(image, [head])[0], rtol=0, atol=1e-5)


def test_mean_field__predictions_of_divided_logits():
    image, logits, divisor = blobs(40, 48), coarse(4, 40, 48, seed=0), torch.full((40, 48), 0.5)
    head = torch.from_numpy(logits)
    found = MeanField().refine(torch.from_numpy(image), [HeadLogits(head, divisor), HeadLogits(head)])
    for prediction, marginals in zip(found.result(), refined(image, [2 * logits, logits]), strict=True):
        assert (prediction == marginals.argmax(0)).float().mean() >= 0.999


@pytest.mark.gpu
def test_refine__cuda_equals_cpu():
    image = torch.from_numpy(scene(160).copy())
    heads = [torch.randn(27, 160, 160, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    on_cuda = refine(image.cuda(), [head.cuda() for head in heads])
    for ours, expected in zip(on_cuda, refine(image, heads), strict=True):
        assert (ours.cpu().argmax(0) == expected.argmax(0)).float().mean() >= 0.999
        assert ((ours.cpu() - expected).abs().amax(0) > 1e-3).float().mean() <= 1e-3
