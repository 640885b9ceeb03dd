import pytest
import torch

from loss.contrastive import masked_contrastive


def masks(seed=0, anchors=6, patches=9):
    drawn = torch.Generator().manual_seed(seed)
    logits = torch.randn(anchors, patches, generator=drawn, dtype=torch.float64)
    positives = torch.rand(anchors, patches, generator=drawn) < 0.3
    negatives = torch.rand(anchors, patches, generator=drawn) < 0.4
    positives[:2] = False
    negatives[0] = False  # an anchor with nothing
    negatives[1] = True  # an anchor with negatives alone
    return logits, positives, negatives


def test_masked_contrastive__is_its_definition_with_its_derivative():
    logits, positives, negatives = masks()
    grad = torch.linspace(0.5, 2, len(logits), dtype=logits.dtype)[:, None]  # (A, 1)
    loss, slope = masked_contrastive(logits, positives, negatives, 0.5, grad, logits.dtype)
    logits.requires_grad_()
    log_total = torch.where(positives | negatives, logits, -torch.inf)[2:].logsumexp(dim=1)
    mean = (logits * positives)[2:].sum(dim=1) / positives[2:].sum(dim=1)
    expected = 0.5 / 0.07 * (log_total - mean)
    torch.testing.assert_close(loss[2:], expected)
    (derivative,) = torch.autograd.grad((expected * grad[2:, 0]).sum(), logits)
    torch.testing.assert_close(slope, derivative)


@pytest.mark.parametrize("scale", [1, 1000])  # large logits must not overflow
def test_masked_contrastive__anchor_without_positives_is_zero(scale):
    logits, positives, negatives = masks()
    logits, ones = scale * logits.float(), torch.ones(len(logits), 1)
    loss, slope = masked_contrastive(logits, positives, negatives, 0.5, ones, torch.float32)
    assert loss[:2].tolist() == [0, 0]
    assert not slope[:2].any()  # NaN would count
    assert torch.isfinite(slope).all()
