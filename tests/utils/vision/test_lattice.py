import math

import numpy as np
import pytest
import torch

from utils.vision.lattice import build_lattice


def points(n, d, *, spread=2.0, seed=0):
    return spread * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def literal_filter(features, values):
    """Splat, blur and slice of the paper in float64, point by point, with a dictionary of vertices."""
    features, values = features.double().numpy(), values.double().numpy()
    d = features.shape[1]
    simplices, table = [], {}
    for feature, value in zip(features, values, strict=True):
        scaled = [f * (d + 1) * math.sqrt(2 / 3 / ((i + 1) * (i + 2))) for i, f in enumerate(feature)]
        elevated = [sum(scaled[i:]) - (i * scaled[i - 1] if i else 0) for i in range(d + 1)]
        origin = [round(x / (d + 1)) * (d + 1) for x in elevated]
        excess = sum(origin) // (d + 1)
        by_rise = sorted(range(d + 1), key=lambda i: elevated[i] - origin[i])
        for i in by_rise[:excess] if excess > 0 else by_rise[excess:] if excess else []:
            origin[i] -= math.copysign(d + 1, excess)
        rise = [x - o for x, o in zip(elevated, origin, strict=True)]
        falling = sorted(range(d + 1), key=lambda i: -rise[i])
        simplex = []
        for remainder in range(d + 1):
            key = [int(o) + remainder for o in origin]
            for i in falling[d + 1 - remainder :]:
                key[i] -= d + 1
            if remainder:
                weight = (rise[falling[d - remainder]] - rise[falling[d + 1 - remainder]]) / (d + 1)
            else:
                weight = 1 - (rise[falling[0]] - rise[falling[d]]) / (d + 1)
            simplex.append((tuple(key), weight))
            table[tuple(key)] = table.get(tuple(key), 0) + weight * value
        simplices.append(simplex)
    for axis in range(d + 1):
        blurred = {}
        for key in table:
            step = [-d if i == axis else 1 for i in range(d + 1)]
            ahead, behind = (tuple(k + sign * s for k, s in zip(key, step, strict=True)) for sign in (1, -1))
            blurred[key] = table[key] + (table.get(ahead, 0) + table.get(behind, 0)) / 2
        table = blurred
    sliced = [sum(weight * table[key] for key, weight in simplex) for simplex in simplices]
    return np.stack(sliced) / (1 + 2.0**-d), len(table)


@pytest.mark.parametrize("spread", [0.2, 2.0])  # a narrow one has keys at the ends of their range
@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_filter__equals_a_literal_one(d, spread):
    features = points(60, d, spread=spread)
    values = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    expected, vertices = literal_filter(features, values)
    lattice = build_lattice(features)
    np.testing.assert_allclose(lattice.filter(values).numpy(), expected, rtol=1e-4, atol=2e-5)
    assert lattice.offsets.numel() - 1 == lattice.neighbours.shape[1] == vertices


def test_filter__chunked_equals_unchunked_with_a_leftover():
    lattice = build_lattice(points(200, 3))
    values = torch.randn(200, 150, generator=torch.Generator().manual_seed(0))
    apart = torch.cat([lattice.filter(part.contiguous()) for part in values.split(50, dim=1)], dim=1)
    torch.testing.assert_close(lattice.filter(values), apart, rtol=0, atol=1e-6)


def test_normalised__equals_its_definition():
    lattice, values = build_lattice(points(50, 2)), torch.rand(50, 3)
    factor = lattice.filter(torch.ones(50, 1)).rsqrt()
    torch.testing.assert_close(
        lattice.normalised(3.0).filter(values), 3 * factor * lattice.filter(factor * values)
    )


def test_normalised__constants_stay_if_all_points_are_equal():
    for features in (torch.zeros(7, 5), torch.full((1, 2), 3.3)):
        filtered = build_lattice(features).normalised(4.0).filter(torch.ones(len(features), 2))
        torch.testing.assert_close(filtered, torch.full_like(filtered, 4.0))


@pytest.mark.gpu
def test_filter__cuda_equals_cpu_and_does_not_wait():
    features, values = points(20_000, 5), torch.rand(20_000, 54)
    on_cpu, on_cuda = build_lattice(features), build_lattice(features.cuda())
    assert torch.equal(on_cpu.vertices, on_cuda.vertices.cpu())
    values_there = values.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = on_cuda.filter(values_there), on_cuda.filter(values_there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
    torch.testing.assert_close(first.cpu(), on_cpu.filter(values), rtol=1e-4, atol=1e-4)
