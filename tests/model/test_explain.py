import math

import numpy as np
import pytest
import torch

from loss.propagation import Boundaries, propagate, select_sets
from model.explain import explain
from utils.plots.explanation import AMBIGUOUS, ITSELF, NEGATIVE, POSITIVE

GRID = (3, 4)  # B = 5 images of it
BOUNDARIES = Boundaries(phi=0.5, psi=0.25, steps=2, sigma_pos=3.0, sigma_amb=2.0)
STILL = {"sigma_pos": math.inf, "sigma_amb": math.inf}


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
    found = explain(bank, (1, 2, 3), grid=GRID, boundaries=BOUNDARIES)
    assert found.similarity.shape == found.zones.shape == (3, 5, 3, 4)
    assert (found.grid, found.steps) == (GRID, 2)
    steps = literal(bank, 12 + 2 * 4 + 3, BOUNDARIES)
    for t, (similarity, phi, psi, moved) in enumerate(steps):
        np.testing.assert_allclose(found.similarity[t].ravel(), similarity, atol=1e-6)
        assert (found.phi[t], found.psi[t]) == pytest.approx((phi, psi), abs=1e-6)
        assert found.moved[t] == pytest.approx(moved, abs=1e-6)
    assert found.moved[1] > 0.01


def test_explain__sets_are_those_of_the_loss(bank):
    found = explain(bank, (4, 0, 1), grid=GRID, boundaries=BOUNDARIES)
    index = torch.tensor([4 * 12 + 1])
    sets = select_sets(propagate(bank[index], bank, BOUNDARIES), index)
    last = found.zones[-1].ravel()
    np.testing.assert_array_equal(last == POSITIVE, sets.positives[0])
    np.testing.assert_array_equal(last == NEGATIVE, sets.negatives[0])
    assert np.flatnonzero(last == ITSELF).tolist() == [49]
    assert all((found.zones == zone).any() for zone in (POSITIVE, AMBIGUOUS, NEGATIVE))


def test_explain__counts_and_numbers(bank):
    found = explain(bank, (1, 2, 3), grid=GRID, boundaries=BOUNDARIES)
    assert found.counts().sum(axis=1).tolist() == [59, 59, 59]
    assert found.counts(1).sum(axis=1).tolist() == [11, 11, 11]
    others = sum(found.counts(image) for image in range(5))
    np.testing.assert_array_equal(others, found.counts())
    last = found.numbers()[-1]
    assert (last["t"], last["positives"]) == (2, (found.zones[-1] == POSITIVE).sum())
    assert last["in_image"]["negatives"] == (found.zones[-1, 1] == NEGATIVE).sum()


def test_explain__without_relocation_the_anchor_decides(bank):
    found = explain(bank, (0, 0, 0), grid=GRID, boundaries=Boundaries(0.5, 0.2, 0, 3.0, 3.0))
    assert found.similarity.shape == (1, 5, 3, 4)
    np.testing.assert_allclose(found.similarity.ravel(), bank @ bank[0], atol=1e-6)
    assert found.moved.tolist() == [0]


def test_explain__alone_in_its_boundary_it_stays():
    bank = torch.eye(6)
    found = explain(bank, (0, 1, 1), grid=(2, 3), boundaries=Boundaries(0.5, -1.0, 2, 3.0, 3.0))
    assert found.moved.tolist() == [0, 0, 0]
    assert found.counts().tolist() == [[0, 5, 0]] * 3


@pytest.mark.parametrize(
    ("phi", "psi", "counts"),
    [
        (-math.inf, -math.inf, [59, 0, 0]),
        (math.inf, math.inf, [0, 0, 59]),
        (math.inf, -math.inf, [0, 59, 0]),
        (-math.inf, math.inf, [59, 0, 0]),  # in both sets: a positive stays one
    ],
)
def test_explain__infinite_boundaries(bank, phi, psi, counts):
    found = explain(bank, (0, 0, 0), grid=GRID, boundaries=Boundaries(phi, psi, 2, **STILL))
    assert found.counts().tolist() == [counts] * 3
    assert np.isfinite(found.similarity).all()
    assert np.isfinite(found.moved).all()


def test_explain__boundaries_that_are_held(bank):
    found = explain(bank, (0, 0, 0), grid=GRID, boundaries=Boundaries(0.5, 0.2, 2, **STILL))
    assert found.phi.tolist() == [0.5] * 3
    assert found.moved[1] > 0


def test_nearest__most_positive_first_and_never_its_own(bank):
    found = explain(bank, (1, 2, 3), grid=GRID, boundaries=BOUNDARIES)
    order = found.nearest(9)
    assert sorted(order) == [0, 2, 3, 4]
    mass = [found.similarity[-1, b][found.zones[-1, b] == POSITIVE].sum() for b in order]
    assert mass == sorted(mass, reverse=True)
    assert found.nearest(2) == order[:2]


@pytest.mark.parametrize("anchor", [(5, 0, 0), (0, 3, 0), (0, 0, 4), (-1, 0, 0)])
def test_explain__anchor_outside(bank, anchor):
    with pytest.raises(ValueError, match="60 patches of grids"):
        explain(bank, anchor, grid=GRID, boundaries=BOUNDARIES)
    with pytest.raises(ValueError, match="60 patches"):
        explain(bank, (0, 0, 0), grid=(7, 7), boundaries=BOUNDARIES)


@pytest.mark.gpu
def test_explain__cuda_equals_cpu(bank):
    on_cpu, on_cuda = (
        explain(bank.to(device), (1, 2, 3), grid=GRID, boundaries=BOUNDARIES) for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(on_cuda.similarity, on_cpu.similarity, atol=1e-5)
    np.testing.assert_array_equal(on_cuda.zones, on_cpu.zones)
