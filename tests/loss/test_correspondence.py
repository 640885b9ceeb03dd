import json
import math
from functools import partial

import pytest
import torch

from loss import correspondence_loss, draw_pairs

IMAGES, GRID, SAMPLES, NEGATIVES = 3, (3, 4), 2, 2
WEIGHTS = {"self": 0.7, "knn": 0.2, "rand": 0.5}
SHIFTS = {"self": 0.1, "knn": -0.2, "rand": 0.3}


def drawn_batch(seed=0, images=IMAGES):
    """Features and codes of images and neighbours, and what the loss compares."""
    drawn = torch.Generator().manual_seed(seed)
    feat, feat_pos = torch.randn(2, images, 6, *GRID, generator=drawn)
    code, code_pos = torch.randn(2, images, 3, *GRID, generator=drawn)
    coords1, coords2, perms = draw_pairs(images, samples=SAMPLES, negatives=NEGATIVES, generator=drawn)
    maps = (feat, feat_pos, code.requires_grad_(), code_pos.requires_grad_())
    return maps, {"coords1": coords1, "coords2": coords2, "perms": perms}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["stego_a", "stego_b"])
def test_loss__golden(golden, name, deterministic, request):
    request.addfinalizer(partial(torch.use_deterministic_algorithms, False))
    torch.use_deterministic_algorithms(deterministic)
    stored = golden(name)
    settings = json.loads(stored.config)
    chosen = {key: settings[key] for key in ("weights", "shifts", "pointwise", "zero_clamp", "stabilize")}
    code, code_pos = stored.code.requires_grad_(), stored.code_pos.requires_grad_()
    pairs = {"coords1": stored.coords1, "coords2": stored.coords2, "perms": stored.perms}
    found = correspondence_loss(stored.feat, stored.feat_pos, code, code_pos, **pairs, **chosen)
    found.total.backward()
    for part in ("self_loss", "knn_loss", "rand_loss", "total"):
        assert getattr(found, part).item() == pytest.approx(getattr(stored, part).item(), rel=1e-5)
    for map_, expected in ((code, stored.grad_code), (code_pos, stored.grad_code_pos)):
        assert (map_.grad - expected).norm() <= 1e-5 * expected.norm()


def sampled(values, x, y):
    """Bilinear value (C,) of a map (C, h, w) at a point, of unit length."""
    height, width = values.shape[1:]
    column, row = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
    left, top = min(int(column), width - 2), min(int(row), height - 2)
    across, down = column - left, row - top
    corners = values[:, top : top + 2, left : left + 2]  # (C, 2, 2)
    upper, lower = (corners[:, i, 0] * (1 - across) + corners[:, i, 1] * across for i in range(2))
    vector = upper * (1 - down) + lower * down
    return vector / vector.norm()


def literal_loss(maps, *, coords1, coords2, perms, weights, shifts, pointwise, zero_clamp, stabilize):
    """The definition, in float64; features and codes are sampled point by point."""
    feat, feat_pos, code, code_pos = maps

    def vectors(values, coords):  # (B, S*S, C)
        points = coords.double().flatten(1, 2).tolist()
        rows = [[sampled(image, *p) for p in where] for image, where in zip(values, points, strict=True)]
        return torch.stack([torch.stack(each) for each in rows])

    def pair(partner_feat, partner_code, coords, shift):
        target = vectors(feat, coords1) @ vectors(partner_feat, coords).mT  # (B, S*S, S*S)
        if pointwise:
            target = target + target.mean() - target.mean(dim=2, keepdim=True)
        found = vectors(code, coords1) @ vectors(partner_code, coords).mT
        found = found.relu() if zero_clamp else found
        found = torch.where(found > 0.8, 0.8, found) if stabilize else found
        return -(found * (target - shift)).mean()

    loss = weights["self"] * pair(feat, code, coords1, shifts["self"])
    loss = loss + weights["knn"] * pair(feat_pos, code_pos, coords2, shifts["knn"])
    rand = [pair(feat[perm], code[perm], coords2, shifts["rand"]) for perm in perms]
    return loss + weights["rand"] * sum(rand) / len(rand)


@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize(("zero_clamp", "stabilize"), [(True, False), (False, True), (False, False)])
def test_loss__literal(pointwise, zero_clamp, stabilize):
    maps, pairs = drawn_batch()
    chosen = {"pointwise": pointwise, "zero_clamp": zero_clamp, "stabilize": stabilize}
    found = correspondence_loss(*maps, **pairs, weights=WEIGHTS, shifts=SHIFTS, **chosen).total
    exact = [each.detach().double().requires_grad_(each.requires_grad) for each in maps]
    expected = literal_loss(exact, **pairs, weights=WEIGHTS, shifts=SHIFTS, **chosen)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for grad, right in zip(
        torch.autograd.grad(found, maps[2:]), torch.autograd.grad(expected, exact[2:]), strict=True
    ):
        torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-6)


def test_loss__lengths_and_autocast_do_not_matter():
    """If every patch of a map is scaled alike, as vectors are normalised."""
    maps, pairs = drawn_batch()
    chosen = pairs | {"weights": WEIGHTS, "shifts": SHIFTS}
    expected = correspondence_loss(*maps, **chosen)
    scaled = correspondence_loss(*(3 * each for each in maps), **chosen)
    torch.testing.assert_close(torch.stack(scaled), torch.stack(expected))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert correspondence_loss(*maps, **chosen) == expected


def test_loss__of_one_image_takes_it_as_its_negative():
    (feat, _, code, _), pairs = drawn_batch(images=1)
    same = dict.fromkeys(SHIFTS, 0.1)
    found = correspondence_loss(feat, feat, code, code, **pairs, weights=WEIGHTS, shifts=same)
    torch.testing.assert_close(found.rand_loss, found.knn_loss)


@pytest.mark.parametrize("images", [2, 3, 16])
def test_pairs__no_image_is_its_own_negative(images):
    for seed in range(20):
        drawn = torch.Generator().manual_seed(seed)
        first, second, perms = draw_pairs(images, samples=5, negatives=3, generator=drawn)
        assert perms.shape == (3, images)
        assert not (perms == torch.arange(images)).any()
        assert set(perms.flatten().tolist()) <= set(range(images))
        assert first.shape == second.shape == (images, 5, 5, 2)
        assert -1 <= min(first.min(), second.min()) <= max(first.max(), second.max()) <= 1
    assert math.isclose(first.mean().item(), 0, abs_tol=0.3)
    again = draw_pairs(images, samples=5, negatives=3, generator=torch.Generator().manual_seed(19))
    assert all(map(torch.equal, again, (first, second, perms)))
