import numpy as np
import pytest
import torch

from model.methods.hp import mix_local


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
