"""Suggested boundaries: estimates against known classes, warnings, and run.py --suggest."""

import json

import pytest
import torch
from torch.nn import functional as F

import run
from dataset import build_data
from dataset.synthetic import NAMES
from model import build_module
from model.kmeans import clear_size
from model.set_quality import patch_classes
from model.suggest import PRECISION, SEPARATED, SIZES, cluster_agreement, estimate
from tests.dataset.files import picture, save
from utils.config.cli import parse_arguments, plan_jobs
from utils.config.loading import find_option_file, load_options, with_changes
from utils.errors import UserError
from utils.training.trainer import build_trainer
from utils.vision.labels import IGNORE


def scenes(spread, *, common=0.0):
    """Features (P, D, h, w) of images of four regions of six classes, and the class of each patch (P, h, w).

    Regions differ from their class by `spread`; `common` is added to all features.
    """
    drawn = torch.Generator().manual_seed(0)
    centres, classes = torch.randn(6, 32, generator=drawn), torch.randint(6, (24, 2, 2), generator=drawn)
    regions = centres[classes] + spread * torch.randn(24, 2, 2, 32, generator=drawn)
    regions, classes = (each.repeat_interleave(4, 1).repeat_interleave(4, 2) for each in (regions, classes))
    features = regions + 0.4 * torch.randn(regions.shape, generator=drawn) + common  # (P, h, w, D)
    return features.permute(0, 3, 1, 2), classes


def estimated(features, seed=0):
    return estimate(features, batch=12, drawn=torch.Generator().manual_seed(seed))


def true_precision(features, classes, phi):
    """Mean over every fourth labelled patch with positives."""
    rows, classes = F.normalize(features.permute(0, 2, 3, 1).flatten(0, 2), dim=1), classes.flatten()
    anchors = torch.arange(len(rows))[classes != IGNORE][::4]
    positives = (rows[anchors] @ rows.T > phi).scatter_(1, anchors[:, None], False) & (classes != IGNORE)
    sizes, right = positives.sum(dim=1), (positives & (classes[anchors, None] == classes)).sum(dim=1)
    return float((right / sizes)[sizes > 0].mean())


@pytest.mark.parametrize("common", [0.0, 3.0])  # 3: all similarities are above 0.75
@pytest.mark.parametrize("spread", [0.2, 0.5])
def test_estimate__precision_is_that_of_the_classes(spread, common):
    features, classes = scenes(spread, common=common)
    found = estimated(features)
    phi, psi = found.boundaries()
    assert psi < phi
    assert found.separation > SEPARATED
    for similarity in (phi, (1 + phi) / 2):
        truth = true_precision(features, classes, similarity)
        assert found.at(found.precision, similarity) == pytest.approx(truth, abs=0.1)


def test_estimate__clusters_that_share_a_class_are_not_underrated():
    """Three broad classes fall into many of the clusters, as adjacent patches show."""
    drawn = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (24, 8, 1), generator=drawn).expand(-1, -1, 8)  # (P, h, w)
    noise = torch.randn(24, 8, 8, 32, generator=drawn)
    features = (torch.randn(3, 32, generator=drawn)[classes] + noise).permute(0, 3, 1, 2)
    found = estimated(features)
    phi, _ = found.boundaries()
    assert found.at(found.precision, phi) == pytest.approx(true_precision(features, classes, phi), abs=0.1)


@pytest.mark.parametrize("spread", [1.0, 1.5])
def test_estimate__overlapping_classes_are_not_overrated(spread):
    features, classes = scenes(spread)
    phi, psi = estimated(features).boundaries()
    assert psi < phi < 0.7
    assert true_precision(features, classes, phi) > PRECISION


def test_estimate__psi_keeps_pairs_of_one_class():
    features, classes = scenes(0.5)
    _, psi = estimated(features).boundaries()
    rows, classes = F.normalize(features.permute(0, 2, 3, 1).flatten(0, 2), dim=1), classes.flatten()
    above, same = (rows @ rows.T) > psi, classes[:, None] == classes
    assert (above & same).sum() / same.sum() > 0.95
    assert (~above & ~same).sum() / (~same).sum() > 0.6


def test_estimate__noise_does_not_separate():
    noise = torch.randn(24, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    assert estimated(noise).separation == pytest.approx(0.5, abs=0.03)
    constant = estimated(torch.ones(12, 4, 4, 4))
    assert constant.separation == pytest.approx(0.5)
    assert all(0.9 < value <= 1 for value in constant.boundaries())


@pytest.fixture
def suggest(tiny_file):
    """Runs --suggest on the tiny options with changes."""

    def call(*words, **changes):
        (result,) = run.main(["--opt", tiny_file(**changes), "--suggest", *words])
        return result

    return call


@pytest.fixture
def photographs(tmp_path):
    for number in range(6):
        save(tmp_path / f"photos/imgs/train/{number}.jpg", picture(number))
    return tmp_path / "photos"


def test_command__writes_results_and_words(suggest, tiny_file, tmp_path, capsys):
    result = suggest("training_coeff.prop_iter=3", wandb__name="other")
    folder = tmp_path / "output/other-suggest"
    assert json.loads((folder / "suggest.json").read_text()) == result
    assert (folder / "suggest.png").stat().st_size > 1000
    assert sorted(path.name for path in folder.parent.iterdir()) == ["other-suggest"]
    assert len(result["shares"]) == 4
    assert all(sum(row.values()) == pytest.approx(100) for row in result["shares"])
    assert len(result["sizes"]) == len(result["agreement"])
    assert f"\n  {result['words']}\n" in capsys.readouterr().out
    words = ["--opt", tiny_file(), *result["words"].split()]
    (job,) = plan_jobs(parse_arguments(words, description="", examples="", training=True))
    chosen = job.options.training_coeff
    assert chosen.initialcrit_pos == result["initialcrit_pos"]
    assert chosen.initialcrit_amb == result["initialcrit_amb"]


@pytest.mark.parametrize(("crop_type", "batch_size"), [("five", 4), (None, 8)])
def test_command__reads_no_labels(suggest, photographs, crop_type, batch_size, monkeypatch):
    """Labels, a number of classes and a whole batch are not needed, and damaged labels change nothing."""
    monkeypatch.setattr("model.suggest.draw_suggestion", lambda *_: None)
    monkeypatch.setattr("model.suggest.SIZES", (2, 3))
    changes = {"dataset__data_type": "directory", "dataset__data_path": str(photographs)}
    changes |= {"dataset__crop_type": crop_type, "dataloader__batch_size": batch_size}
    without = suggest(**changes)
    for number in range(6):
        path = photographs / f"labels/train/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not a label")
    assert suggest(**changes) == without
    assert without["images"] == (30 if crop_type else 6)


@pytest.mark.parametrize("word", ["train.frozen=true", "method=stego"])
def test_command__is_for_ppap(suggest, word):
    with pytest.raises(UserError, match="must be ppap with --suggest"):
        suggest(word)


def check_with_labels(name, *expected, **changes):
    """The boundaries are near the expected ones, and the precision at Phi_0 near the labels'."""
    options = with_changes(load_options(find_option_file(name)), {"train.seed": 1} | changes)
    data, batch = build_data(options), options.dataloader.batch_size
    module, trainer = build_module(options, data.labels), build_trainer(options)
    order = torch.randperm(len(data.train_set), generator=torch.Generator().manual_seed(1))
    items = [data.train_set[index] for index in order[:32].tolist()]
    features = module.frozen_features(torch.stack([item.image for item in items]), trainer)
    found = estimate(features, batch=batch, drawn=torch.Generator().manual_seed(1))
    phi, psi = found.boundaries()
    assert (phi, psi) == pytest.approx(expected, abs=0.08)  # 32 images are few
    labels, patch = torch.stack([item.label for item in items]), module.segmenter.backbone.spec.patch
    classes = patch_classes(labels[:batch], patch, n_classes=data.labels.n_classes)
    truth = true_precision(features[:batch], classes, phi)
    assert found.at(found.precision, phi) == pytest.approx(truth, abs=0.1)
    return features


def test_demo__valley_and_number_of_textures():
    features = check_with_labels("demo.json", 0.3, 0.3)
    assert clear_size(SIZES, cluster_agreement(features, 0).mean(dim=0).tolist()) == len(NAMES)


@pytest.mark.slow
def test_camvid__as_with_labels(shared):
    weights = str(shared / "data/weights/vits14_depth10.pth")
    changes = {"model.pretrained.pretrained_weights": weights, "dataloader.num_workers": 0}
    changes["dataset.data_path"] = str(shared / "data/camvid")
    check_with_labels("camvid.json", 0.8, 0.3, **changes)
