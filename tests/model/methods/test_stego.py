import copy

import pytest
import torch

from dataset.base import Batch
from loss.correspondence import correspondence_loss, draw_pairs
from model.methods.base import Progress
from model.methods.stego import STEGO
from tests.model.methods.conftest import GRID, IMAGES
from utils.training.randomness import generator

SMALL = {"method": "stego", "stego.feature_samples": 3, "stego.neg_samples": 2, "stego.num_neighbors": 2}


@pytest.fixture
def method_of(tiny_options, segmenter):
    def make(dropout=0.1, **changed):
        chosen = SMALL | {f"stego.{key}": value for key, value in changed.items()}
        return STEGO(tiny_options(**chosen, model__criterion_dropout=dropout), segmenter)

    return make


@pytest.fixture
def pairs(batch_of):
    """Images, followed by a neighbour of each."""
    own, other = batch_of(1), batch_of(2)
    return Batch(*(torch.cat(both) for both in zip(own, other, strict=True)))


def step(method, segmenter, batch, number=1):
    return method(segmenter, batch, method.draws(IMAGES, GRID, number, dim=12), Progress(number, 6))


def test_stego__loss_from_its_definition(segmenter, method_of, pairs):
    """Without dropout; lambdas, b and the clamps are those of the options."""
    clamps = {"pointwise": False, "zero_clamp": False, "stabilize": True}
    method = method_of(dropout=0.0, weight_self=0.3, shift_knn=0.4, **clamps)
    features = segmenter.features(segmenter.tokens(pairs.inputs), GRID)
    code = segmenter.head(features)
    drawn = draw_pairs(IMAGES, samples=3, negatives=2, generator=generator(0, "points", 1))
    expected = correspondence_loss(
        *features.split(IMAGES),
        *code.split(IMAGES),
        **dict(zip(("coords1", "coords2", "perms"), drawn, strict=True)),
        weights={"self": 0.3, "knn": 0.25, "rand": 0.63},
        shifts={"self": 0.08, "knn": 0.4, "rand": 0.66},
        **clamps,
    )
    output = step(method, segmenter, pairs)
    assert output.losses["stego_loss"] == expected.total
    assert list(output.statistics) == ["self_loss", "knn_loss", "rand_loss"]
    assert output.statistics["knn_loss"] == expected.knn_loss
    assert torch.equal(output.code, code[:IMAGES])


def test_stego__trains_the_head_alone(segmenter, method_of, pairs):
    method, before = method_of(), copy.deepcopy(segmenter.backbone.state_dict())
    step(method, segmenter, pairs).losses["stego_loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in segmenter.head.parameters())
    assert all(parameter.grad is None for parameter in segmenter.backbone.parameters())
    assert all(map(torch.equal, segmenter.backbone.state_dict().values(), before.values()))
    assert method.state_dict() == {}


def test_stego__a_step_is_a_function_of_seed_and_step(segmenter, method_of, pairs):
    """Whatever the global generators; images and neighbours have masks of their own."""
    torch.manual_seed(1)
    first = step(method_of(), segmenter, pairs, 3).losses["stego_loss"]
    torch.manual_seed(2)
    assert step(method_of(), segmenter, pairs, 3).losses["stego_loss"] == first
    assert step(method_of(), segmenter, pairs, 4).losses["stego_loss"] != first
    draws = method_of(dropout=0.5).draws(IMAGES, GRID, 3, dim=12)
    masks = [draws[name] for name in ("linear", "nonlinear", "features")]
    halves = [half for mask in masks for half in mask.split(IMAGES)]
    assert len({tuple(half.flatten().tolist()) for half in halves}) == 6
