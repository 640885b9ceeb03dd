import math

import pytest
import torch

from loss.contrastive import masked_contrastive


def masks(seed=0, anchors=6, patches=9):
    drawn = torch.Generator().manual_seed(seed)
    logits = torch.randn(anchors, patches, generator=drawn, dtype=torch.float64)
    positives = torch.rand(anchors, patches, generator=drawn) < 0.3
    kept = positives | (torch.rand(anchors, patches, generator=drawn) < 0.4)
    positives[0] = kept[0] = False  # an anchor with nothing
    positives[1] = False
    kept[1] = True  # an anchor with negatives alone
    return logits, positives, kept


def test_masked_contrastive__by_hand():
    logits = torch.tensor([[1.0, 2.0, 5.0, 3.0]])
    positives = torch.tensor([[True, True, False, False]])
    kept = torch.tensor([[True, True, False, True]])
    total = math.log(math.e + math.e**2 + math.e**3)
    expected = -(0.7 / 0.07) * ((1 - total) + (2 - total)) / 2
    loss, _ = masked_contrastive(logits, positives, kept=kept, tau=0.7)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_masked_contrastive__slope_is_the_derivative():
    logits, positives, kept = masks()
    logits.requires_grad_()
    loss, slope = masked_contrastive(logits, positives, kept=kept, tau=0.5, with_slope=True)
    (expected,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("scale", [1, 1000])  # large logits must not overflow
def test_masked_contrastive__anchor_without_positives_is_zero(scale):
    logits, positives, kept = masks()
    loss, slope = masked_contrastive(scale * logits.float(), positives, kept=kept, tau=0.5, with_slope=True)
    assert loss[:2].tolist() == [0, 0]
    assert not slope[:2].any()  # NaN would count
    assert torch.isfinite(slope).all()
