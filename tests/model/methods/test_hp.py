import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loss.hidden_positive import hidden_positive_loss
from model.methods.base import Progress
from model.methods.hp import COLOUR_VIEW, HP, mix_local, specific_weight
from tests.model.methods.conftest import GRID, IMAGES
from utils.training.randomness import seeded
from utils.vision.transforms import normalise


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mix_local__golden(golden):
    stored = golden("hp_mix")
    mixed = mix_local(stored.code, stored.attention_logits)
    torch.testing.assert_close(mixed, stored.code_mixed, rtol=1e-5, atol=1e-5)


def literal_mix(code, logits):
    """The definition for one image, patch by patch, in float64; code (K, h, w), logits (heads, T, T)."""
    _, height, width = code.shape
    n = height * width
    scores = logits[:, -n:, -n:].double().mean(dim=0).numpy()
    mixed = torch.zeros_like(code, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            row = scores[y * width + x]
            exponent = np.exp(np.clip(row, *np.quantile(row, [0.1, 0.9])))
            attention = 28 * exponent / exponent.sum()
            attention[attention < 28 / n] = 0
            near = [
                (v, u)
                for v in range(max(0, y - 1), min(height, y + 2))
                for u in range(max(0, x - 1), min(width, x + 2))
            ]
            for v, u in near:
                mixed[:, y, x] += attention[v * width + u] * code[:, v, u].double() / len(near)
    return mixed


@pytest.mark.parametrize(("grid", "tokens"), [((3, 5), 16), ((4, 2), 9), ((1, 3), 4), ((3, 3), 14)])
def test_mix_local__literal(grid, tokens):
    """Also with register tokens before the patches."""
    code, logits = drawn(2, 4, *grid), 2 * drawn(2, 3, tokens, tokens, seed=1)
    mixed = mix_local(code, logits)
    expected = torch.stack([literal_mix(*image) for image in zip(code, logits, strict=True)])
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (28, 28)])
def test_mix_local__uniform_attention_is_a_scaled_mean(grid):
    patches = grid[0] * grid[1]
    code, logits = drawn(1, 3, 1, 1).expand(1, 3, *grid), torch.full((1, 2, 1 + patches, 1 + patches), 0.7)
    torch.testing.assert_close(mix_local(code, logits), 28 / patches * code)


def test_mix_local__gradient_reaches_the_neighbours_alone():
    code, logits = drawn(1, 3, 5, 5).requires_grad_(), torch.zeros(1, 2, 26, 26, requires_grad=True)
    mix_local(code, logits)[0, :, 2, 1].sum().backward()
    reached = torch.zeros(5, 5, dtype=torch.bool)
    reached[1:4, 0:3] = True
    assert torch.equal(code.grad[0, 0] != 0, reached)
    assert logits.grad is None


def test_specific_weight__rises_linearly_after_the_warmup():
    found = [specific_weight(step, 10, 4) for step in range(1, 11)]
    assert found == [0, 0, 0, 0, 0, *(t / 6 for t in range(1, 6))]
    assert specific_weight(10, 10, 10) == specific_weight(3, 4, 100) == 0


def train(segmenter, method, batch_of, steps, *, total=6, optimizer_state=None):
    """Trains as the module does; returns the losses of each step and the optimizer's state."""
    groups = [
        {"params": parameters, "lr": 0.01, "weight_decay": section.weight_decay}
        for parameters, section in method.groups(segmenter)
    ]
    optimizer, found = torch.optim.AdamW(groups), []
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    for step in steps:
        if method.reference_images(step, step - 1):
            method.prepare(segmenter, [batch_of(100 + step), batch_of(200 + step)], step)
        drawn = method.draws(IMAGES, GRID, step, dim=12)
        output = method(segmenter, batch_of(step), drawn, Progress(step, total))
        optimizer.zero_grad()
        sum(output.losses.values()).backward()
        optimizer.step()
        found.append({name: loss.detach() for name, loss in output.losses.items()})
    return found, optimizer.state_dict()


def test_hp__a_step_trains_head_and_projection_alone(segmenter, options_of, batch_of):
    method = HP(options_of(), segmenter)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    head = copy.deepcopy(segmenter.head)
    torch.manual_seed(1)
    (losses,), _ = train(segmenter, method, batch_of, [1])
    assert losses["hp_loss"] > 0
    assert losses["consistency_loss"] > 0
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"projection.weight", "projection.bias", "pools.agnostic", "pools.specific"}
    assert not any(map(torch.equal, segmenter.head.parameters(), head.parameters()))
    assert not any(parameter.requires_grad for parameter in method.average.parameters())


def test_hp__average_lags_the_head_by_a_step(segmenter, options_of, batch_of):
    """It starts as the head, and takes in the weights from before the optimizer's step."""
    method, start = HP(options_of(), segmenter), copy.deepcopy(segmenter.head)
    _, state = train(segmenter, method, batch_of, [1])
    first = copy.deepcopy(segmenter.head)
    train(segmenter, method, batch_of, [2], optimizer_state=state)
    for kept, old, new in zip(*map(nn.Module.parameters, (method.average, start, first)), strict=True):
        torch.testing.assert_close(kept, 0.9 * old + 0.1 * new)


def test_hp__resumed_equals_uninterrupted(segmenter, options_of, batch_of):
    """Pools are renewed before steps 1, 3 and 5, and the global generators play no part."""
    other, options = copy.deepcopy(segmenter), options_of()
    method = HP(options, segmenter)
    whole, _ = train(segmenter, method, batch_of, range(1, 7))
    stopped = HP(options, other)
    torch.manual_seed(5)
    begun, state = train(other, stopped, batch_of, range(1, 4))
    resumed = HP(options, other)
    resumed.load_state_dict(stopped.state_dict())
    ended, _ = train(other, resumed, batch_of, range(4, 7), optimizer_state=state)
    assert begun + ended == whole
    assert all(map(torch.equal, method.state_dict().values(), resumed.state_dict().values()))
    assert all(map(torch.equal, segmenter.head.parameters(), other.head.parameters()))


def test_hp__cached_tokens_equal_images(segmenter, options_of, batch_of):
    batch, found = batch_of(1), []
    for inputs in (batch.inputs, segmenter.tokens(batch.inputs)):
        method = HP(options_of(alpha=0.0), segmenter)
        method.prepare(segmenter, [batch_of(2), batch_of(3)], 1)
        drawn = method.draws(IMAGES, GRID, 1, dim=12)
        found.append(method(segmenter, batch._replace(inputs=inputs), drawn, Progress(1, 6)).losses)
    assert found[0] == found[1]
    assert list(found[0]) == ["hp_loss"]


def test_hp__without_positives_the_contrastive_loss_is_0(segmenter, options_of, batch_of):
    """A pool that holds a batch's own patches leaves none above it."""
    method, batch = HP(options_of(dropout=0.0, pool_size=IMAGES * 16), segmenter), batch_of(1)
    features = segmenter.features(segmenter.tokens(batch.inputs), GRID)  # (4, D, 4, 4)
    rows = F.normalize(features.permute(0, 2, 3, 1).flatten(0, 2), dim=1)
    method.load_state_dict(method.state_dict() | {"pools.agnostic": 2 * rows})
    losses = method(segmenter, batch, method.draws(IMAGES, GRID, 1, dim=12), Progress(1, 6)).losses
    assert losses["hp_loss"] == 0
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in segmenter.head.parameters())


def changed_colours(images, step):
    found = []
    for number, image in enumerate(images):
        with seeded(0, "colour view", step, number):
            found.append(COLOUR_VIEW(image))
    return torch.stack(found)


def test_colour_view__moves_no_pixel_and_differs_between_images():
    """A flat image stays flat, whatever is drawn; two images change differently."""
    flat = torch.full((2, 3, 8, 8), 0.4)
    flat[:, 0] = 0.7
    first, second = changed_colours(flat, step=1)
    assert first.flatten(1).std(dim=1).max() < 1e-6
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("published", [False, True])
def test_hp__view_changes_colours_before_or_after_normalisation(
    segmenter, options_of, batch_of, monkeypatch, published
):
    """`published_colour` jitters normalised images, which torchvision clamps to [0, 1]."""
    seen, encode = [], segmenter.encode

    def noted(image):
        seen.append(image)
        return encode(image)

    monkeypatch.setattr(segmenter, "encode", noted)
    method, batch = HP(options_of(published_colour=published), segmenter), batch_of(1)
    drawn = method.draws(IMAGES, GRID, 1, dim=12)
    method(segmenter, batch, drawn, Progress(1, 6))
    given = normalise(batch.inputs) if published else batch.inputs / 255
    expected = changed_colours(given, step=1)
    torch.testing.assert_close(seen[-1], expected if published else normalise(255 * expected))
    assert (seen[-1].min() < 0) != published


def test_hp__two_groups_and_the_projection_without_decay(segmenter, options_of):
    method = HP(options_of(), segmenter)
    (head, net), (projection, without_decay) = method.groups(segmenter)
    assert [id(each) for each in head] == [id(each) for each in segmenter.head.parameters()]
    assert [id(each) for each in projection] == [id(each) for each in method.projection.parameters()]
    assert (net.weight_decay, without_decay.weight_decay, without_decay.lr) == (0.1, 0.0, net.lr)


def test_hp__pools_are_due_at_the_start_and_within_epochs(segmenter, options_of):
    method = HP(options_of(renew_interval=3), segmenter)
    steps = [(step, (step - 1) % 5) for step in range(1, 11)]  # epochs of five steps
    assert [step for step, batch_idx in steps if method.reference_images(step, batch_idx)] == [1, 4, 9]


def test_hp__denominator_is_a_function_of_seed_and_step(segmenter, options_of):
    """rho of the patches, in mean; 1 keeps all."""
    method = HP(options_of(rho=0.3), segmenter)
    first, again, other = (method._kept(4000, 16, step) for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.float().mean() == pytest.approx(0.3, abs=0.01)
    assert HP(options_of(rho=1.0), segmenter)._kept(64, 16, 1).all()


def test_hp__losses_from_their_definitions(segmenter, options_of, batch_of):
    """A step without dropout and with lambda 0.6, composed of the parts that have their own tests."""
    method, batch = HP(options_of(dropout=0.0, rho=1.0), segmenter), batch_of(1)
    method.prepare(segmenter, [batch_of(2), batch_of(3)], 1)
    torch.manual_seed(1)
    for parameter in method.average.parameters():  # unlike the head
        parameter.add_(torch.randn(parameter.shape))
    draws = method.draws(IMAGES, GRID, 5, dim=12)

    def rows(values):
        return F.normalize(values.permute(0, 2, 3, 1).flatten(0, 2), dim=1)

    def projected(code):
        return F.normalize(method.projection(code.permute(0, 2, 3, 1).flatten(0, 2)), dim=1)

    tokens = segmenter.tokens(batch.inputs)
    features = segmenter.features(tokens, GRID)
    code = segmenter.head(features)
    mixed = mix_local(code, segmenter.backbone.attention_logits(tokens, GRID)[:, None])
    scaled = changed_colours(batch.inputs / 255, step=5)
    view_code = segmenter.head(segmenter.features(segmenter.encode(normalise(255 * scaled)), GRID))
    expected = hidden_positive_loss(
        projected(code),
        projected(mixed),
        f=rows(features),
        e=rows(method.average(features)),
        pool_ag=method.pools.agnostic,
        pool_sp=method.pools.specific,
        keep=torch.ones(16, IMAGES * 16, dtype=torch.bool),
        spatial_size=4,
        lmbd=0.6,
        tau=method.options.training_coeff.tau,
    )
    distance = (projected(code) - projected(view_code) + 1e-6).norm(dim=1).mean()
    output = method(segmenter, batch, draws, Progress(5, 6))
    torch.testing.assert_close(output.losses["hp_loss"], expected)
    torch.testing.assert_close(output.losses["consistency_loss"], 0.05 * distance)
    torch.testing.assert_close(output.code, code)
    assert output.statistics["lambda"] == pytest.approx(0.6)
