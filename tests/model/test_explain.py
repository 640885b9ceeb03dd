"""Explanations follow the paper's equations and the sets of the loss; banks; eval.py --explain."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from dataset import build_data
from loss.propagation import Boundaries, propagate, select_sets
from model.explain import build_bank, explain
from tests.dataset.files import picture, save
from utils.errors import UserError
from utils.plots.explain_figure import AMBIGUOUS, ANCHOR, NEGATIVE, POSITIVE

GRID = (3, 4)  # B = 5 images of it
BOUNDARIES = Boundaries(phi=0.5, psi=0.25, steps=2, sigma_pos=3.0, sigma_amb=2.0)


@pytest.fixture
def bank():
    """Patches about three directions."""
    drawn = torch.Generator().manual_seed(0)
    centres = 1.2 * torch.randn(3, 16, generator=drawn)
    rows = centres[torch.randint(3, (60,), generator=drawn)] + torch.randn(60, 16, generator=drawn)
    return torch.nn.functional.normalize(rows, dim=1)


def literal(bank, index, boundaries):
    """Section 3 of the paper for one anchor, in float64: (similarity, phi, psi, moved) for each t."""
    rows = bank.double().numpy()
    v, phi, psi = rows[index], boundaries.phi, boundaries.psi
    steps = [(rows @ v, phi, psi, 0.0)]
    for _ in range(boundaries.steps):
        mean = rows[rows @ v > phi].mean(axis=0)
        after = mean / np.linalg.norm(mean)
        moved = 1 - after @ v
        v, phi, psi = after, phi - moved / boundaries.sigma_pos, psi + moved / boundaries.sigma_amb
        steps.append((rows @ v, phi, psi, moved))
    return steps


def test_explain__is_the_literal_computation(bank):
    found = explain(bank, (2, 3), grid=GRID, boundaries=BOUNDARIES)
    assert found.similarity.shape == found.zones.shape == (3, 5, 3, 4)
    for t, (similarity, phi, psi, moved) in enumerate(literal(bank, 2 * 4 + 3, BOUNDARIES)):
        np.testing.assert_allclose(found.similarity[t].ravel(), similarity, atol=1e-6)
        assert (found.phi[t], found.psi[t]) == pytest.approx((phi, psi), abs=1e-6)
        assert found.moved[t] == pytest.approx(moved, abs=1e-6)
    assert found.moved[1] > 0.01


def test_explain__sets_are_those_of_the_loss(bank):
    found = explain(bank, (0, 1), grid=GRID, boundaries=BOUNDARIES)
    index = torch.tensor([1])
    sets = select_sets(propagate(bank[index], bank, BOUNDARIES), index)
    last = found.zones[-1].ravel()
    np.testing.assert_array_equal(last == POSITIVE, sets.positives[0])
    np.testing.assert_array_equal(last == NEGATIVE, sets.negatives[0])
    assert np.flatnonzero(last == ANCHOR).tolist() == [1]
    assert all((found.zones == zone).any() for zone in (POSITIVE, AMBIGUOUS, NEGATIVE))


def test_explain__counts_numbers_and_nearest(bank):
    found = explain(bank, (2, 3), grid=GRID, boundaries=BOUNDARIES)
    assert found.counts().sum(axis=(1, 2)).tolist() == [59, 59, 59]
    last = found.numbers()[-1]
    assert (last["t"], last["positives"]) == (2, (found.zones[-1] == POSITIVE).sum())
    assert last["in_image"]["negatives"] == (found.zones[-1, 0] == NEGATIVE).sum()
    order = found.nearest(9)
    assert sorted(order) == [1, 2, 3, 4]
    mass = [found.similarity[-1, b][found.zones[-1, b] == POSITIVE].sum() for b in order]
    assert mass == sorted(mass, reverse=True)


@pytest.mark.parametrize(
    ("phi", "psi", "counts"),
    [
        (0.5, -1.0, [0, 5, 0]),  # alone in its boundary, so the proxy stays
        (-math.inf, math.inf, [5, 0, 0]),  # a patch of both sets is positive
    ],
)
def test_explain__extreme_boundaries(phi, psi, counts):
    found = explain(torch.eye(6), (1, 1), grid=(2, 3), boundaries=Boundaries(phi, psi, 2, math.inf, math.inf))
    assert found.counts()[:, 0].tolist() == [counts] * 3
    assert np.isfinite(found.moved).all()
    assert (found.moved[1] > 0) == (phi < 0)


@pytest.fixture
def photographs(tmp_path, tiny_options):
    def make(train, val):
        """A directory data set of photographs without labels."""
        for split, count in (("train", train), ("val", val)):
            for number in range(count):
                save(tmp_path / "imgs" / split / f"{number}.png", picture([number, count]))
        changes = {"data_type": "directory", "n_classes": 3, "data_path": str(tmp_path), "crop_type": "five"}
        options = tiny_options(**{f"dataset__{key}": value for key, value in changes.items()})
        return build_data(options, train=False)

    return make


def test_bank__the_image_and_others_spread_over_the_split(photographs, tmp_path):
    data = photographs(train=0, val=9)
    images, names = build_bank(data, "4", size=5)
    assert [name.rsplit("/", 1)[1] for name in names] == ["4.png", "0.png", "2.png", "5.png", "7.png"]
    assert images.shape == (5, 3, 32, 32)
    assert torch.equal(images[0], data.validation_set[4].image)
    assert torch.equal(images[3], data.validation_set[5].image)
    whole, _ = build_bank(data, str(tmp_path / "imgs/val/4.png"), size=64)
    assert torch.equal(whole, build_bank(data, "4", size=64)[0])  # not twice in its own bank
    wide = np.zeros((40, 160, 3), dtype=np.uint8)
    wide[:, 60:100] = 255  # all that a centre crop keeps
    Image.fromarray(wide).save(tmp_path / "wide.png")
    images, _ = build_bank(data, str(tmp_path / "wide.png"), size=8)
    assert images[0].min() == 255
    for image in ("9", "-1", "nowhere.png"):
        with pytest.raises(UserError, match=f"--explain is {image}, must be an image file or an index"):
            build_bank(data, image, size=8)


def test_command__needs_no_number_of_classes_and_skips_damaged_images(photographs, tiny_file, tmp_path):
    photographs(train=4, val=0)
    (tmp_path / "imgs/train/0.png").write_bytes(b"no image")
    chosen = {"dataset__data_type": "directory", "dataset__data_path": str(tmp_path)}
    path = tiny_file(**chosen, dataset__skip_damaged=True)
    (found,) = evaluation.main(["--opt", path, "--explain", "0"])
    assert found["image"].endswith("1.png")
    assert found["images"] == 3
    page = tmp_path / "page.html"
    evaluation.main(["--opt", path, "--explore", "0", "--out", str(page)])
    assert page.exists()


def test_command__writes_figures_and_numbers(tiny_file, tmp_path, capsys):
    path = tiny_file(checkpoint="nowhere", training_coeff__prop_iter=1)
    (found,) = evaluation.main(["--opt", path, "--explain", "5", "--patch", "3,0"])
    assert (found["patch"], found["grid"], found["images"]) == ([3, 0], [4, 4], 4)
    assert [step["t"] for step in found["steps"]] == [0, 1]
    (centre,) = evaluation.main(["--opt", path, "--explain", "0"])
    assert centre["patch"] == [2, 2]
    folder = tmp_path / "output/tiny/explain"
    stored = json.loads((folder / "explain.json").read_text())
    assert stored == {"synthetic_val_scene_5_3_0": found, "synthetic_val_scene_0_2_2": centre}
    assert all(Image.open(folder / f"{name}.png").width > 900 for name in stored)
    assert "synthetic val scene 5, patch 3,0" in capsys.readouterr().out
    with pytest.raises(UserError, match="--patch is 4,0, but the patch grid has rows 0 to 3"):
        evaluation.main(["--opt", path, "--explain", "0", "--patch", "4,0"])
