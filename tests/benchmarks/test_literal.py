"""The literal forms compute what the published code does, and every benchmark runs."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from dataset.base import SegmentationDataset
from dataset.crops import prepared_folder
from dataset.datamodule import prepared_crops
from loss import PPAPLoss
from model.methods.ppap import build_criterion
from tests.benchmarks import literal
from tests.benchmarks.__main__ import main
from tests.benchmarks.inputs import SHAPES, loss_inputs, shape_options, write_photographs
from tests.benchmarks.measure import Bench, Cost
from tests.conftest import needs_pydensecrf
from utils.vision.crf import crf_missing, upsample
from utils.vision.transforms import Geometry, normalise, to_eight_bit


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


@needs_pydensecrf
def test_crf__golden(golden):
    stored = golden("crf")
    image = to_eight_bit(stored.image[None])[0].permute(1, 2, 0).numpy()
    marginals = literal.crf(image, upsample(stored.logits.numpy(), image.shape[:2]))
    assert (marginals.argmax(0) == stored.argmax.numpy()).mean() >= 0.999
    assert np.abs(marginals - stored.q.numpy()).max() < 1e-3


def test_two_views__the_first_is_our_item(tmp_path):
    write_photographs(tmp_path, images=1, n_classes=5)
    crops = prepared_crops(prepared_folder(tmp_path, "directory", "five", 0.5), 5)
    raw, ours = crops.read(2), SegmentationDataset(crops, Geometry(64))[2]
    image, second, label = literal.two_views(raw.image, raw.label, 64, crops.rule)
    torch.testing.assert_close(image, normalise(ours.image[None])[0])
    assert torch.equal(label, ours.label)
    assert second.shape == image.shape


def test_inputs__every_set_is_there():
    options = shape_options("small")
    criterion = build_criterion(options)
    inputs = loss_inputs(options, criterion, 2, torch.device("cpu"))
    output = criterion(inputs.z, inputs.features, inputs.anchors)
    patches = len(inputs.z)
    assert 0 < output.num_positives < patches / 2
    assert 0 < output.num_negatives < patches


def test_bench__ratio_and_floor_of_known_times(monkeypatch):
    bench = Bench(torch.device("cpu"), repeats=3)
    seconds = {"literal": 4.0, "ours": 0.5}
    monkeypatch.setattr(bench, "first_run", lambda form: (9.0, 0.0))  # slow, as first runs are
    monkeypatch.setattr(bench, "once", lambda form: seconds[form()])
    monkeypatch.setattr(bench, "rate", lambda operand: 100.0)
    monkeypatch.setattr(bench, "bandwidth", lambda: 10.0)
    forms = {name: (lambda name=name: name) for name in seconds}
    costs = {"ours": [Cost(operations=20.0, bytes=1.0), Cost(operations=1.0, bytes=0.5)]}
    literally, ours = bench.compare("a case", forms, costs=costs, items=2)
    assert (literally.gain, literally.floor) == (None, None)
    assert (ours.gain, ours.items) == (8.0, 4.0)
    assert ours.floor == pytest.approx(20 / 100 + 0.5 / 10)
    assert [row.seconds for row in bench.compare("a case", forms, once=True)] == [9.0, 9.0]


def test_program__runs_every_case(monkeypatch, tmp_path, tiny_file, capsys):
    monkeypatch.setitem(SHAPES, "small", tiny_file())
    monkeypatch.setattr(Bench, "_least", Bench.once)
    monkeypatch.setattr("gc.collect", lambda: None)
    monkeypatch.setattr("tests.benchmarks.compute.GROWTH_BATCHES", (1,))
    monkeypatch.setattr("tests.benchmarks.compute.LOSS_BATCHES", {"cpu": (1,)})
    monkeypatch.setattr("tests.benchmarks.evaluation.REFINED", 1)
    monkeypatch.setattr("tests.benchmarks.pipeline.PHOTOGRAPHS", {"cpu": 2})
    path = tmp_path / "rows.json"
    rows = main(["all", "--device", "cpu", "--shape", "small", "--repeats", "1", "--json", str(path)])
    forms = {}
    for row in rows:
        forms.setdefault(row.case.split(",")[0].split(" of ")[0], []).append(row.form)
        assert row.seconds > 0
    crf = forms.pop("crf", None)
    assert crf_missing() or (crf[0], crf[-1]) == ("literal", "ours, torch on cpu")
    assert forms == {
        "loss": ["literal", "ours", "ours, split", "ours, float16"],
        "growth": ["ours"] * 7,
        "step": ["ours", "ours, split", "ours, float16", "literal"],
        "methods": ["frozen", "ppap", "stego", "hp"],
        "epoch": ["ours", "literal", "ours, cached tokens"],
        "eval": ["literal", "ours"],
        "data": ["literal", "ours", "ours, cut on the fly"],
    }
    stored = json.loads(path.read_text())
    assert [row["seconds"] for row in stored["rows"]] == [row.seconds for row in rows]
    assert stored["rates"]["float32 Gop/s"] > 0
    assert "loss, batch 1: ours" in capsys.readouterr().out
