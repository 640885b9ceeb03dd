import pytest
import torch

from utils.vision.lattice import build_lattice


def points(n, d, *, spread=2.0, seed=0):
    return spread * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


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
