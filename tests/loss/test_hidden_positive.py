import json

import pytest
import torch
from torch.nn import functional as F

from loss import hidden_positive_loss
from tests.loss.conftest import Recorded

SIDE, IMAGES = 4, 3
PATCHES = IMAGES * SIDE**2
SETTINGS = {"spatial_size": SIDE, "lmbd": 0.4, "tau": 0.6, "reweighting": True}


def drawn_batch(seed=0):
    """z and z_mix with gradients, and arguments that leave each set non-trivial."""
    drawn = torch.Generator().manual_seed(seed)

    def rows(count, dim, centres=0):
        vectors = torch.randn(count, dim, generator=drawn)
        if centres:
            which = torch.randint(centres, (count,), generator=drawn)
            vectors = torch.randn(centres, dim, generator=drawn)[which] + 0.6 * vectors
        return F.normalize(vectors, dim=1)

    codes = [rows(PATCHES, 5).requires_grad_() for _ in range(2)]
    given = {"f": rows(PATCHES, 6, centres=4), "e": rows(PATCHES, 5, centres=4)}
    given |= {"pool_ag": rows(7, 6), "pool_sp": rows(7, 5)}
    given["keep"] = torch.rand(SIDE**2, PATCHES, generator=drawn) < 0.2
    return codes, given


def without_positives(given, patches):
    """The arguments with features that leave some patches without a task-agnostic positive."""
    directions = torch.eye(len(patches), len(patches) + given["f"].shape[1])  # orthogonal to all others
    f, pool = (F.pad(given[name], (len(patches), 0)) for name in ("f", "pool_ag"))
    f[patches] = directions
    return given | {"f": f, "pool_ag": torch.cat([pool, directions])}


def gradients(codes, **arguments):
    loss = hidden_positive_loss(*codes, **SETTINGS | arguments)
    return loss.item(), torch.autograd.grad(loss, codes)


@pytest.mark.parametrize("name", ["hp_loss_a", "hp_loss_b"])
def test_loss__golden(golden, name):
    stored, names = golden(name), ("f", "e", "pool_ag", "pool_sp", "keep")
    settings = json.loads(stored.config) | {key: getattr(stored, key) for key in names}
    del settings["rho"]  # of the Bernoulli draw of keep
    codes = stored.z.requires_grad_(), stored.z_mix.requires_grad_()
    found, grads = gradients(codes, **settings)
    assert found == pytest.approx(stored.loss.item(), rel=1e-5)
    for grad, expected in zip(grads, (stored.grad_z, stored.grad_z_mix), strict=True):
        assert (grad - expected).norm() <= 1e-5 * expected.norm()


def literal_loss(codes, *, f, e, pool_ag, pool_sp, keep, spatial_size, lmbd, tau, reweighting):
    """The definition in float64, with matrices of all patches; also how many blocks have anchors."""
    others = ~torch.eye(PATCHES, dtype=torch.bool)

    def positives(rows, pool):  # (N, N)
        rows = rows.double()
        least = (rows @ pool.double().T).amax(dim=1)
        return (rows @ rows.T > torch.minimum(least, least[:, None])) & others

    agnostic, specific = positives(f, pool_ag), positives(e, pool_sp)
    weight = agnostic + lmbd * specific.double()
    kept = agnostic | (keep.repeat(IMAGES, 1) & others)
    losses = []
    for block in torch.arange(PATCHES).split(spatial_size**2):
        anchors = block[agnostic[block].any(dim=1)]
        for z in codes if len(anchors) else ():
            logits = z[anchors] @ z.T / tau
            total = torch.where(kept[anchors], logits, -torch.inf).logsumexp(dim=1)
            w = weight[anchors].sum(dim=1)
            terms = (weight[anchors] * (logits - total[:, None])).sum(dim=1)
            losses.append(-tau / 0.07 * (terms / (w.mean() if reweighting else w)).mean())
    return sum(losses) / len(losses), len(losses) / 2


@pytest.mark.parametrize("reweighting", [True, False])
@pytest.mark.parametrize("lmbd", [0.0, 0.7])
def test_loss__literal(reweighting, lmbd):
    codes, given = drawn_batch()
    given = without_positives(given, [2, 3, 20])  # no anchors, but with task-specific positives
    arguments = SETTINGS | given | {"reweighting": reweighting, "lmbd": lmbd}
    exact = [code.detach().double().requires_grad_() for code in codes]
    expected, blocks = literal_loss(exact, **arguments)
    assert blocks == IMAGES
    found, grads = gradients(codes, **arguments, weight_dtype=torch.float32)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    for grad, right in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-5)


def test_loss__block_without_anchors_is_skipped():
    codes, given = drawn_batch()
    arguments = without_positives(given, list(range(SIDE**2)))
    found, grads = gradients(codes, **arguments, weight_dtype=torch.float32)
    expected, blocks = literal_loss([code.double() for code in codes], **SETTINGS | arguments)
    assert blocks == IMAGES - 1
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_loss__without_any_anchor_is_zero_with_a_graph():
    codes, given = drawn_batch()
    given |= {"pool_ag": given["f"], "keep": torch.zeros_like(given["keep"])}  # each is most like itself
    found, grads = gradients(codes, **given)
    assert found == 0
    assert not any(grad.any() for grad in grads)


def test_loss__autocast_around_it_changes_nothing():
    codes, given = drawn_batch()
    expected = gradients(codes, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(codes, **given)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_loss__no_tensor_is_larger_than_a_block_and_the_batch():
    codes, given = drawn_batch()
    with Recorded() as recorded:
        hidden_positive_loss(*codes, **SETTINGS, **given).backward()
    assert recorded.largest == SIDE**2 * PATCHES
