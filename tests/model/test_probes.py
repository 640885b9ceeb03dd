import pytest
import torch

from model.probes import ClusterProbe, LinearProbe, read_both


def test_probes__golden(golden):
    stored = golden("model_tiny8")
    linear, cluster = LinearProbe(48, 6), ClusterProbe(48, 7)
    with torch.no_grad():
        linear.classifier.weight.copy_(stored.lin_w)
        linear.classifier.bias.copy_(stored.lin_b)
        cluster.clusters.copy_(stored.clusters)
    code, label = stored.code0, stored.label.long()
    assert cluster.loss(code).item() == pytest.approx(stored.cluster_loss_hard.item(), abs=1e-6)
    torch.testing.assert_close((2 * cluster(code)).log_softmax(1), stored.cluster_logprob, atol=1e-5, rtol=0)
    similarity = cluster(code)  # (B, K, h, w)
    soft = -((2 * similarity).softmax(1) * similarity).sum(1).mean()
    assert soft.item() == pytest.approx(stored.cluster_loss_soft.item(), abs=1e-6)
    assert linear.loss(code, label).item() == pytest.approx(stored.linear_loss.item(), abs=1e-5)
    assert torch.equal(cluster(code).argmax(1), stored.cluster_pred.long())
    for probe, expected in ((cluster.inner, stored.cluster_pred_up), (linear, stored.linear_pred_up)):
        upsampled = torch.nn.functional.interpolate(probe(code), size=(64, 64), mode="bilinear")
        assert (upsampled.argmax(1) == expected).float().mean() > 0.9999  # but for ties


def test_linear_probe__ignores_labels_outside_the_classes():
    probe, code = LinearProbe(4, 3), torch.randn(1, 4, 2, 2)
    label = torch.tensor([[[0, 1], [2, 255]]])
    assert torch.equal(probe.loss(code, label), probe.loss(code, label.masked_fill(label == 255, 7)))
    loss = probe.loss(code, torch.full((1, 8, 8), 255))  # no valid pixel: 0 with a graph
    loss.backward()
    assert loss.item() == 0
    assert not probe.classifier.weight.grad.any()


def test_read_both__equals_each_alone():
    code = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    linear, cluster = LinearProbe(8, 3), ClusterProbe(8, 4)
    both = read_both(code, linear=linear, cluster=cluster)
    torch.testing.assert_close(both["linear"], linear(code))
    torch.testing.assert_close(both["cluster"], cluster.inner(code))
