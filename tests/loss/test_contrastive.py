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


def test_masked_contrastive__slope_is_the_derivative():
    logits, positives, kept = masks()
    logits.requires_grad_()
    grad = torch.linspace(0.5, 2, len(logits), dtype=logits.dtype)[:, None]  # (A, 1)
    loss, _ = masked_contrastive(logits, positives, kept, 0.5, None, logits.dtype)
    (expected,) = torch.autograd.grad((loss * grad[:, 0]).sum(), logits)
    same, slope = masked_contrastive(logits.detach(), positives, kept, 0.5, grad, logits.dtype)
    torch.testing.assert_close(slope, expected)
    assert torch.equal(same, loss)


@pytest.mark.parametrize("scale", [1, 1000])  # large logits must not overflow
def test_masked_contrastive__anchor_without_positives_is_zero(scale):
    logits, positives, kept = masks()
    logits, ones = scale * logits.float(), torch.ones(len(logits), 1)
    loss, slope = masked_contrastive(logits, positives, kept, 0.5, ones, torch.float32)
    assert loss[:2].tolist() == [0, 0]
    assert not slope[:2].any()  # NaN would count
    assert torch.isfinite(slope).all()
