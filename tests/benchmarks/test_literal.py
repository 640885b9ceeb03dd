"""The literal forms compute what the published code does, and every benchmark runs."""

import json

import pytest
import torch
from torch import nn

from dataset.base import SegmentationDataset
from dataset.image_folder import ImageFolder
from loss import PPAPLoss
from model.methods.ppap import build_criterion
from tests.benchmarks import literal
from tests.benchmarks.__main__ import main
from tests.benchmarks.inputs import SHAPES, loss_inputs, shape_options, write_photographs
from utils.config.options import DatasetOptions
from utils.vision.transforms import Geometry, normalise


@pytest.mark.parametrize("name", ["loss_cocostuff8", "loss_cocostuff16", "loss_potsdam"])
def test_loss__golden(golden, name):
    stored = golden(name)
    z = stored.z.requires_grad_()
    chosen = PPAPLoss(**json.loads(stored.config))
    loss = literal.ppap_loss(z, stored.feat, stored.anchors, boundaries=chosen.boundaries, tau=chosen.tau)
    loss.backward()
    assert loss.item() == pytest.approx(stored.loss.item(), rel=1e-5)
    assert (z.grad - stored.grad_z).norm() <= 1e-5 * stored.grad_z.norm()


def test_predictions__golden(golden):
    stored = golden("model_tiny8")
    linear = nn.Conv2d(48, 6, 1)
    linear.load_state_dict({"weight": stored.lin_w, "bias": stored.lin_b})
    with torch.no_grad():
        found = literal.predictions(stored.code0, (64, 64), linear=linear, centroids=stored.clusters)
    assert torch.equal(found["linear"], stored.linear_pred_up.long())
    assert torch.equal(found["cluster"], stored.cluster_pred_up.long())


def test_two_views__the_first_is_our_item(tmp_path):
    write_photographs(tmp_path, images=1, n_classes=5)
    options = DatasetOptions(data_type="directory", data_path=str(tmp_path), crop_type=None)
    source = ImageFolder(options, "train")
    raw, ours = source.read(0), SegmentationDataset(source, Geometry(64))[0]
    image, second, label = literal.two_views(raw.image, raw.label, 64, source.rule)
    torch.testing.assert_close(image, normalise(ours.image[None])[0])
    assert torch.equal(label, ours.label)
    assert second.shape == image.shape


def test_inputs__every_set_is_there():
    options = shape_options("small")
    z, features, anchors = loss_inputs(options, 2, torch.device("cpu"))
    output = build_criterion(options)(z, features, anchors)
    assert 0 < output.num_positives < len(z) / 2
    assert 0 < output.num_negatives < len(z)


def test_program__runs_every_case(monkeypatch, tiny_file, capsys):
    monkeypatch.setitem(SHAPES, "small", tiny_file())
    monkeypatch.setattr("gc.collect", lambda: None)
    monkeypatch.setattr("tests.benchmarks.compute.GROWTH_BATCHES", (1,))
    monkeypatch.setattr("tests.benchmarks.compute.LOSS_BATCHES", {"cpu": (1,)})
    monkeypatch.setattr("tests.benchmarks.pipeline.PHOTOGRAPHS", {"cpu": 2})
    rows = main(["all", "--device", "cpu", "--shape", "small", "--repeats", "1"])
    forms = {}
    for row in rows:
        forms.setdefault(row.case.split(",")[0].split(" of ")[0], []).append(row.form)
        assert row.seconds > 0
    assert forms == {
        "loss": ["literal", "ours", "ours, split", "ours, float16"],
        "growth": ["ours"] * 7,
        "step": ["ours", "ours, split", "ours, float16", "literal"],
        "methods": ["frozen", "ppap", "stego", "hp"],
        "epoch": ["ours", "literal", "ours, cached tokens"],
        "eval": ["literal", "ours"],
        "data": ["literal", "ours", "ours, cut on the fly"],
    }
    assert "loss, batch 1: ours" in capsys.readouterr().out
