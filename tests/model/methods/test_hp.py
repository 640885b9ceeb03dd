import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loss.hidden_positive import hidden_positive_loss
from model.methods.base import Progress
from model.methods.hp import COLOUR_VIEW, HP, mix_local, specific_weight, unit_rows, update_average
from model.segmenter import TwoBranchHead
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


PARTS = {"1.0": "linear", "2.0": "nonlinear.0", "2.2": "nonlinear.2"}  # published name -> ours


def stored_head(stored, when, branch):
    """A head with the stored weights whose published names start with `branch`."""
    state = {
        f"{ours}.{kind}": getattr(stored, f"{when}/{branch}{theirs}.{kind}")
        for theirs, ours in PARTS.items()
        for kind in ("weight", "bias")
    }
    channels, dim = state["linear.weight"].shape[:2]
    head = TwoBranchHead(dim, channels)
    head.load_state_dict(state)
    return head


def test_head_and_average__golden(golden):
    stored = golden("hp_mix")
    head, average = (stored_head(stored, "before", branch) for branch in ("cluster", "ema_model"))
    features = stored.feat[:, 1:].transpose(1, 2).unflatten(2, (4, 4))  # (B, D, h, w), without CLS
    for network, expected in ((head, stored.code), (average, stored.code_ema)):
        torch.testing.assert_close(network(features).detach(), expected, rtol=1e-5, atol=1e-5)
    update_average(average, head, momentum=json.loads(stored.config)["ema_m"])
    for name, parameter in average.named_parameters():
        part, kind = name.rsplit(".", 1)
        (theirs,) = (key for key, ours in PARTS.items() if ours == part)
        if (expected := getattr(stored, f"after/ema_model{theirs}.{kind}", None)) is not None:
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


def test_head__either_branch_has_its_own_dropout():
    head, features = TwoBranchHead(4, 3), drawn(2, 4, 5, 6)
    kept, dropped = torch.ones(2, 4, 1, 1), torch.zeros(2, 4, 1, 1)
    constant = head(features, (dropped, dropped))
    assert torch.equal(constant, constant[:1, :, :1, :1].expand_as(constant))
    one, other = head(features, (kept, dropped)) - constant, head(features, (dropped, kept)) - constant
    torch.testing.assert_close(one, head.linear(features) - head.linear(0 * features))
    torch.testing.assert_close(one + other + constant, head(features))


def step(method, segmenter, batch, number=1):
    return method(segmenter, batch, method.draws(IMAGES, GRID, number, dim=12), Progress(number, 6))


def test_hp__a_step_trains_head_and_projection_and_the_average_lags(segmenter, options_of, batch_of):
    """The average starts as the head, and takes in the weights from before the optimizer's step."""
    method, start = HP(options_of(), segmenter), copy.deepcopy(segmenter.head)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    (head, net), (projection, without_decay) = method.groups(segmenter)
    assert (net.weight_decay, without_decay.weight_decay, without_decay.lr) == (0.1, 0.0, net.lr)
    assert method.reference_images(1, 0) == 2 * IMAGES
    method.prepare(segmenter, [batch_of(2), batch_of(3)], 1)
    optimizer = torch.optim.AdamW([*head, *projection], lr=0.01)
    losses = step(method, segmenter, batch_of(1)).losses
    assert min(losses["hp_loss"], losses["consistency_loss"]) > 0
    sum(losses.values()).backward()
    optimizer.step()
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"projection.weight", "projection.bias", "pools.agnostic", "pools.specific"}
    assert not any(map(torch.equal, segmenter.head.parameters(), start.parameters()))
    step(method, segmenter, batch_of(1), 2)
    networks = method.average, start, segmenter.head
    for kept, old, new in zip(*map(nn.Module.parameters, networks), strict=True):
        torch.testing.assert_close(kept, 0.9 * old + 0.1 * new)
        assert not kept.requires_grad


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
    batch = batch_of(1)
    step(HP(options_of(published_colour=published), segmenter), segmenter, batch)
    given = normalise(batch.inputs) if published else batch.inputs / 255
    expected = changed_colours(given, step=1)
    torch.testing.assert_close(seen[-1], expected if published else normalise(255 * expected))
    assert (seen[-1].min() < 0) != published


def test_hp__pools_are_due_at_the_start_and_within_epochs(segmenter, options_of):
    method = HP(options_of(renew_interval=3), segmenter)
    steps = [(step, (step - 1) % 5) for step in range(1, 11)]  # epochs of five steps
    assert [step for step, batch_idx in steps if method.reference_images(step, batch_idx)] == [1, 4, 9]


def test_hp__pools_take_a_patch_of_each_image(segmenter, options_of, batch_of):
    method, batches = HP(options_of(dropout=0.0), segmenter), [batch_of(1), batch_of(2)]
    method.prepare(segmenter, batches, 1)
    features = torch.cat([segmenter.features(segmenter.tokens(each.inputs), GRID) for each in batches])
    maps, chosen = {"agnostic": features, "specific": segmenter.head(features).detach()}, []
    for name, rows in method.pools.named_buffers():
        patches = F.normalize(maps[name].flatten(2), dim=1)  # (8, D, 16)
        distance = (patches - rows.float()[:, :, None]).norm(dim=1)  # (8, 16)
        assert distance.amin(dim=1).max() < 2e-3  # float16
        chosen.append(distance.argmin(dim=1))
    assert not torch.equal(*chosen)


def test_hp__pools_are_a_function_of_seed_and_step(segmenter, options_of, batch_of):
    first, again = (HP(options_of(dropout=0.3), segmenter) for _ in range(2))
    first.prepare(segmenter, [batch_of(1), batch_of(2)], 1)
    torch.manual_seed(5)
    again.prepare(segmenter, [batch_of(1), batch_of(2)], 1)
    assert all(map(torch.equal, first.pools.buffers(), again.pools.buffers()))
    assert (first.pools.agnostic == 0).any(), "dropout of channels"
    again.prepare(segmenter, [batch_of(1), batch_of(2)], 2)
    assert torch.equal(first.pools.agnostic, again.pools.agnostic)
    assert not torch.equal(first.pools.specific, again.pools.specific)


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
        f=unit_rows(features),
        e=unit_rows(method.average(features)),
        pool_ag=method.pools.agnostic,
        pool_sp=method.pools.specific,
        keep=torch.ones(16, IMAGES * 16, dtype=torch.bool),
        spatial_size=4,
        lmbd=0.6,
        tau=method.options.training_coeff.tau,
        weight_dtype=torch.float32,
    )
    distance = (projected(code) - projected(view_code) + 1e-6).norm(dim=1).mean()
    output = step(method, segmenter, batch, 5)
    torch.testing.assert_close(output.losses["hp_loss"], expected)
    torch.testing.assert_close(output.losses["consistency_loss"], 0.05 * distance)
    torch.testing.assert_close(output.code, code)
    assert output.statistics["lambda"] == pytest.approx(0.6)
