"""What the Triton path of the loss must do; run by test_fused.py, interpreted or compiled for a GPU.

Triton decides when it is imported whether kernels are interpreted, so these run in a process of their own.
"""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from loss import PPAPLoss
from loss.fused import fused_sums
from loss.launch import INTERPRETED, gather, split_bank, threshold
from loss.propagation import Boundaries
from tests.loss.oracle import oracle_loss
from tests.loss.test_ppap import COEFFICIENTS, clustered_batch

DEVICE = "cpu" if INTERPRETED else "cuda"
CLOSE = 2e-6 if INTERPRETED else 1e-5  # relative; a GPU's exponential is an approximation
GOLDEN = ["loss_cocostuff8", "loss_cityscapes_base", "loss_potsdam", "loss_cocostuff16"]


def evaluate(backend, z, features, anchors, **chosen):
    """The outputs and the gradient of z, on the CPU."""
    z = z.detach().to(DEVICE).requires_grad_()
    output = PPAPLoss(**chosen, backend=backend)(z, features.to(DEVICE), anchors)
    output.loss.backward()
    outputs = torch.stack([output.loss, output.num_positives, output.num_negatives]).detach()
    return outputs.cpu(), z.grad.cpu()


def batch(*, images=2, height=9, width=7, dim=24, width_of_z=24, seed=0):
    """Features around a few centres and z (N, width_of_z) of unit length."""
    drawn = torch.Generator().manual_seed(seed)
    count = images * height * width
    centres = torch.randn(4, dim, generator=drawn)
    rows = centres[torch.randint(4, (count,), generator=drawn)] + 0.6 * torch.randn(
        count, dim, generator=drawn
    )
    z = F.normalize(torch.randn(count, width_of_z, generator=drawn), dim=1)
    return z, rows.view(images, height, width, dim).permute(0, 3, 1, 2).contiguous()


def agree(z, features, anchors=None, **chosen):
    """Holds both backends against each other; returns the outputs."""
    chosen = COEFFICIENTS | {"group_size": 50} | chosen
    if anchors is None:
        anchors = PPAPLoss(**chosen).sample_anchors(len(z), torch.Generator().manual_seed(1))
    outputs, grad = evaluate("triton", z, features, anchors, **chosen)
    expected, expected_grad = evaluate("torch", z, features, anchors, **chosen)
    torch.testing.assert_close(outputs, expected, rtol=CLOSE, atol=1e-6)
    assert (grad - expected_grad).norm() <= CLOSE * expected_grad.norm()
    return outputs


@pytest.mark.parametrize("name", GOLDEN[:3] if INTERPRETED else GOLDEN)
def test_golden(golden, name):
    stored = golden(name)
    outputs, grad = evaluate("triton", stored.z, stored.feat, stored.anchors, **json.loads(stored.config))
    assert outputs[0].item() == pytest.approx(stored.loss.item(), rel=CLOSE)
    assert (grad - stored.grad_z).norm() <= CLOSE * stored.grad_z.norm()
    assert outputs[1].item() == pytest.approx(stored.num_positives.item(), rel=1e-6)
    assert outputs[2].item() == pytest.approx(stored.num_below_psi.item(), rel=1e-6)


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"prop_iter": 0, "tau": 0.07},
        {"prop_iter": 3, "sigma_pos": 0.5, "sigma_amb": 0.2},  # Psi passes Phi: the sets overlap
        {"sigma_pos": math.inf, "sigma_amb": math.inf, "initialcrit_pos": -0.1},
    ],
)
def test_oracle__leftovers_on_every_axis(chosen):
    z, features = batch(images=1, height=9, width=11, dim=5, width_of_z=3)  # groups of 50 and 49
    chosen = COEFFICIENTS | {"group_size": 50, "trainpatchsplit": 7} | chosen
    anchors = PPAPLoss(**chosen).sample_anchors(len(z), torch.Generator().manual_seed(1))
    exact = z.double().requires_grad_()
    shared = {key: chosen[key] for key in ("sigma_pos", "sigma_amb", "tau")}
    phi, psi = chosen["initialcrit_pos"], chosen["initialcrit_amb"]
    expected = oracle_loss(exact, features, anchors, phi0=phi, psi0=psi, steps=chosen["prop_iter"], **shared)
    expected.loss.backward()
    assert expected.margin > 1e-6  # float32 and float64 agree on every set
    outputs, grad = evaluate("triton", z, features, anchors, **chosen)
    assert outputs[0].item() == pytest.approx(expected.loss.item(), rel=CLOSE)
    assert outputs[1].item() == pytest.approx(expected.num_positives)
    assert outputs[2].item() == pytest.approx(expected.num_negatives)
    assert (grad - exact.grad).norm() <= CLOSE * exact.grad.norm()


@pytest.mark.parametrize(
    ("dim", "width_of_z"), [(1, 1), (70, 140), (384, 400), (24, 768)]
)  # accumulators of the gradient: 1, 2, 2 + 2, 3 + 3
def test_torch__feature_sizes(dim, width_of_z):
    z, features = batch(dim=dim, width_of_z=width_of_z)
    agree(z, features, trainpatchsplit=9)


def test_torch__more_patches_than_a_span():
    z, features = batch(images=2, height=33, width=32)
    agree(z, features, group_size=900, trainpatchsplit=200)


def test_torch__more_anchors_than_a_block():
    z, features = batch(images=1, height=15, width=10)
    agree(z, features, group_size=150, trainpatchsplit=1)


def test_torch__short_groups_and_unused_anchors():
    z, features = batch()
    anchors = torch.tensor([[0, 5, 9], [-1, -1, -1], [70, -1, -1], [31, 32, -1], [63, 64, 125]])
    agree(z, features, anchors)


@pytest.mark.parametrize("patches", [1, 2, 31, 32, 33])
def test_torch__few_patches(patches):
    z, features = batch(images=1, height=1, width=patches)
    agree(z, features, trainpatchsplit=1)


def test_torch__float16_operands():
    z, features = batch()
    agree(z, features, similarity_dtype=torch.float16)


def test_torch__large_logits():
    z, features = batch()
    agree(100 * z, features)  # up to 12,500: every exponential is taken below a running maximum


def test_torch__group_without_positives():
    features = torch.eye(6)[None, :, :, None].clone()  # (1, 6, 6, 1), all orthogonal
    features[0, :, 1] = features[0, :, 0]  # but patches 0 and 1, of the first group, are one
    z, _ = batch(images=1, height=6, width=1)
    outputs = agree(z, features, torch.tensor([[0, 1, 2], [3, 4, 5]]))
    assert outputs[0] > 0


def test_no_positive_anywhere__is_zero_with_a_graph():
    z, features = batch()
    outputs = agree(z, features, initialcrit_pos=2.0)
    assert outputs[:2].tolist() == [0, 0]


def test_no_positive__its_negatives_do_not_overflow():
    z, features = batch()
    chosen = COEFFICIENTS | {"initialcrit_pos": 2.0, "initialcrit_amb": 0.9}
    anchors = torch.arange(20)[:, None]
    for backend in ("triton", "torch"):
        outputs, grad = evaluate(backend, 100 * z, features, anchors, **chosen)
        assert outputs[0] == 0
        assert not grad.any()


def test_nothing_kept_but_positives():
    z, features = batch()
    agree(z, features, initialcrit_amb=-3.0, initialcrit_pos=-2.0)


def test_float16_operands__round_before_the_boundary():
    cosine = 0.6001201  # above 0.60011; the nearest float16, 0.60009765625, lies below
    features = torch.tensor([[1.0, cosine], [0.0, math.sqrt(1 - cosine**2)]])[None, :, None]  # (1, 2, 1, 2)
    chosen = COEFFICIENTS | {"initialcrit_pos": 0.60011, "prop_iter": 0}
    anchors = torch.tensor([[0]])
    for dtype, positives in ((torch.float32, 1), (torch.float16, 0)):
        outputs, _ = evaluate("triton", torch.eye(2), features, anchors, **chosen, similarity_dtype=dtype)
        assert outputs[1] == positives


def test_two_runs__are_bit_equal():
    z, features = batch(images=2, height=33, width=32)
    chosen = COEFFICIENTS | {"group_size": 900, "trainpatchsplit": 300}
    anchors = PPAPLoss(**chosen).sample_anchors(len(z), torch.Generator().manual_seed(1))
    first, second = (evaluate("triton", z, features, anchors, **chosen) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_not_finite__is_seen():
    z, features = batch()
    z[3] = math.nan
    outputs, _ = evaluate("triton", z, features, torch.tensor([[0, 1, 2, 3]]), **COEFFICIENTS)
    assert outputs[0].isnan()


def test_gradient__scales_and_is_asked_for():
    z, features = clustered_batch()
    z, features = z.detach().to(DEVICE).requires_grad_(), features.to(DEVICE)
    criterion = PPAPLoss(**COEFFICIENTS, backend="triton")
    anchors = criterion.sample_anchors(len(z), torch.Generator().manual_seed(1))
    (once,) = torch.autograd.grad(criterion(z, features, anchors).loss, z)
    (scaled,) = torch.autograd.grad(2048 * criterion(z, features, anchors).loss, z)
    torch.testing.assert_close(scaled, 2048 * once, rtol=0, atol=0)
    assert not criterion(z.detach(), features, anchors).loss.requires_grad


def test_dtype__is_that_of_the_projections():
    z, features = clustered_batch()
    z = z.detach().half().to(DEVICE).requires_grad_()
    output = PPAPLoss(**COEFFICIENTS, backend="triton")(z, features.half().to(DEVICE))
    output.loss.backward()
    assert (output.loss.dtype, z.grad.dtype) == (torch.float32, torch.float16)


def packed(flags):
    """Bits as the kernels hold them: (A, N) bool -> (A, W) int32."""
    count, patches = flags.shape
    padded = torch.zeros(count, -(-patches // 32) * 32, dtype=torch.int64)
    padded[:, :patches] = flags
    words = (padded.view(count, -1, 32) << torch.arange(32)).sum(dim=2)  # (A, W)
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("operand", [torch.float32, torch.float16])
def test_gather__sums_as_float32_would(operand):
    drawn = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(2100, 70, generator=drawn), dim=1).to(operand).float()  # a span and more
    flags = torch.rand(5, 2100, generator=drawn) < torch.tensor([[0], [0.01], [0.1], [0.5], [1]])
    found = gather(packed(flags).to(DEVICE), split_bank(bank.to(DEVICE), operand))
    exact = flags.double() @ bank.double()
    assert torch.equal(found.size.cpu(), flags.sum(dim=1, keepdim=True).float())
    assert ((found.total.cpu() - exact).abs() <= 2**-20 * (flags.double() @ bank.double().abs())).all()


def test_split_bank__leaves_what_it_says():
    bank = F.normalize(torch.randn(50, 768, generator=torch.Generator().manual_seed(0)), dim=1)
    bank[0] = torch.eye(768)[0]
    bank[1] = 0
    bank[2] *= 2.0**-30
    split = split_bank(bank, torch.float32)
    rest = (split.high.double() + split.low.double()) / split.scale - bank.double()
    assert (rest.abs() <= 2**-22 * bank.double().abs() + 2**-37).all()


def test_threshold__bits_are_the_sets():
    drawn = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(133, 24, generator=drawn), dim=1)
    phi, psi = torch.linspace(-0.2, 0.2, 7)[:, None], torch.full((7, 1), 0.1)
    moved = (bank[:7].to(DEVICE), split_bank(bank.to(DEVICE), torch.float32))
    found = threshold(*moved, phi=phi.to(DEVICE), psi=psi.to(DEVICE))
    similarity = bank[:7].double() @ bank.double().T
    assert torch.equal(found.above.cpu(), packed(similarity > phi))
    assert torch.equal(found.below.cpu(), packed(similarity < psi))


def test_fused__waits_for_nothing_and_holds_no_pair():
    """No look at a tensor's value, and nothing larger than a bit a pair."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls, largest = set(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            calls.add(str(function))
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.numel() * result.element_size())
            return result

    z, _ = batch(images=1, height=12, width=25, width_of_z=3)
    z, anchors = z.to(DEVICE), torch.arange(300)[None].to(DEVICE)
    boundaries = Boundaries(0.55, 0.2, 1, sigma_pos=3, sigma_amb=3)
    with Watch():
        sums = fused_sums(z, z, anchors, boundaries=boundaries, tau=0.8, with_grad=True).sums
    assert max(largest) == 300 * -(-300 // 32) * 4  # bytes
    looks = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")
    found = {name for name in calls if any(look in name for look in looks)}
    assert not found
    assert sums[0] > 0
