import itertools
import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from loss import PPAPLoss, ieee_float32
from tests.loss.conftest import Recorded
from tests.loss.oracle import oracle_loss

TOLERANCES = {  # of loss, gradient and counts; measured: 2e-7, 5e-7, 1e-7; 2e-6, 3e-4, 1e-7; 3e-6, 2e-3, 9e-5
    "float32": (1e-5, 1e-5, 1e-6),
    "split": (1e-5, 1e-3, 1e-6),  # the same sets; logits and slopes of float16 operands, 2^-11 = 5e-4
    "float16": (2e-5, 6e-3, 3e-4),  # patches near a boundary change sets
}
GOLDEN_LOSSES = ["loss_cocostuff8", "loss_cocostuff16", "loss_cityscapes_base", "loss_potsdam"]
COEFFICIENTS = {
    "initialcrit_pos": 0.55,
    "initialcrit_amb": 0.2,
    "prop_iter": 2,
    "sigma_pos": 3.0,
    "sigma_amb": 3.0,
    "trainpatchsplit": 4,
    "tau": 0.8,
    "group_size": 16,
}


def clustered_batch(*, images=3, dim=8, side=4, seed=0):
    """Features around a few centres, so that every set is non-trivial; z of unit length."""
    drawn = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, dim, generator=drawn)
    which = torch.randint(4, (images * side * side,), generator=drawn)
    rows = centres[which] + 0.6 * torch.randn(len(which), dim, generator=drawn)
    features = rows.view(images, side, side, dim).permute(0, 3, 1, 2).contiguous()
    z = F.normalize(torch.randn(len(which), dim, generator=drawn), dim=1)
    return z.requires_grad_(), features


@pytest.mark.parametrize("name", GOLDEN_LOSSES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("products", "chunk_size"), [("float32", 1), *itertools.product(TOLERANCES, [None, 60])]
)
def test_loss__golden(golden, name, device, products, chunk_size):
    stored = golden(name)
    z = stored.z.to(device).requires_grad_()
    criterion = PPAPLoss(**json.loads(stored.config), chunk_size=chunk_size, products=products)
    output = criterion(z, stored.feat.to(device), stored.anchors)
    output.loss.backward()
    loss, grad, counts = TOLERANCES[products]
    assert output.loss.item() == pytest.approx(stored.loss.item(), rel=loss)
    assert (z.grad.cpu() - stored.grad_z).norm() <= grad * stored.grad_z.norm()
    if device == "cpu":
        assert output.num_positives.item() == pytest.approx(stored.num_positives.item(), rel=counts)
        assert output.num_negatives.item() == pytest.approx(stored.num_below_psi.item(), rel=counts)


@settings(max_examples=60, deadline=None)  # 60 that pass the margin, or hypothesis complains
@given(
    shape=st.tuples(*(st.integers(1, largest) for largest in (3, 5, 4, 3))),  # images, dim, height, width
    coefficients=st.fixed_dictionaries(
        {
            "initialcrit_pos": st.floats(-1.1, 1.1),
            "initialcrit_amb": st.floats(-1.1, 1.1),
            "prop_iter": st.integers(0, 5),
            "sigma_pos": st.sampled_from([0.05, 0.5, 3.0, math.inf]),
            "sigma_amb": st.sampled_from([0.05, 0.5, 3.0, math.inf]),
            "trainpatchsplit": st.integers(1, 8),
            "tau": st.sampled_from([0.07, 0.5, 0.8]),
            "group_size": st.integers(1, 20),
            "chunk_size": st.sampled_from([None, 1, 5]),
        }
    ),
    seed=st.integers(0, 10**6),
)
def test_loss__oracle(shape, coefficients, seed):
    drawn, (images, _, height, width) = torch.Generator().manual_seed(seed), shape
    features = torch.randn(shape, generator=drawn)
    z = F.normalize(torch.randn(images * height * width, 3, generator=drawn), dim=1).requires_grad_()
    criterion = PPAPLoss(**coefficients)
    anchors = criterion.sample_anchors(len(z), drawn)
    exact_z = z.detach().double().requires_grad_()
    expected = oracle_loss(exact_z, features, anchors, **coefficients)
    assume(expected.margin > 1e-5)  # float32 and float64 agree on every set
    output = criterion(z, features, anchors)
    output.loss.backward()
    expected.loss.backward()
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=2e-4, abs=2e-4)
    assert (z.grad.double() - exact_z.grad).norm() <= 1e-4 * exact_z.grad.norm() + 1e-6 / criterion.tau
    assert output.num_positives.item() == pytest.approx(expected.num_positives)
    assert output.num_negatives.item() == pytest.approx(expected.num_negatives)
    assert output.reached.tolist() == pytest.approx(expected.reached, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("around", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss__dtypes_and_autocast(dtype, around):
    z, features = clustered_batch()
    criterion = PPAPLoss(**COEFFICIENTS)
    anchors = criterion.sample_anchors(len(z), torch.Generator().manual_seed(1))
    low_z, low_features = z.detach().to(dtype).requires_grad_(), features.to(dtype)
    reference = criterion(low_z.float(), low_features.float(), anchors)
    with torch.autocast("cpu", dtype=around):
        output = criterion(low_z, low_features, anchors)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert low_z.grad.dtype == dtype
    assert output.loss.item() == reference.loss.item()  # autocast around it changes nothing
    assert output.num_positives == reference.num_positives


@pytest.mark.parametrize("chunk_size", [1, 10, 1000])
def test_loss__chunked_equals_unchunked_with_a_leftover(chunk_size):
    z, features = clustered_batch(images=3, side=4)  # 48 patches: groups of 20, 20 and 8
    chosen = COEFFICIENTS | {"group_size": 20}
    anchors = PPAPLoss(**chosen).sample_anchors(len(z), torch.Generator().manual_seed(1))
    whole, parts = (PPAPLoss(**chosen, chunk_size=size)(z, features, anchors) for size in (None, chunk_size))
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(parts.reached, whole.reached)
    torch.testing.assert_close(torch.autograd.grad(parts.loss, z), torch.autograd.grad(whole.loss, z))


def test_loss__intermediate_tensors():
    """At most chunk x N entries; no float64 (MPS) and no integer products (CUDA)."""
    z, features = clustered_batch(images=6, side=8)  # 384 patches of 8 channels
    with Recorded() as recorded:
        PPAPLoss(**COEFFICIENTS, chunk_size=12)(z, features).loss.backward()
    assert recorded.largest == 12 * 384
    for function, read, made in recorded.calls:
        assert all(result.dtype != torch.float64 for result in made), function
        if any(word in str(function) for word in ("aten.mm", "aten.mv", "addmm", "addmv", "aten.bmm")):
            assert all(operand.is_floating_point() for operand in read), function


def test_loss__elementwise_traffic():
    """Bytes that eager operations move for each pair of an anchor and a patch, products aside."""
    z, features = clustered_batch(images=6, side=8)  # 384 patches, 96 anchors
    with Recorded() as recorded:
        PPAPLoss(**COEFFICIENTS)(z, features).loss.backward()
    moved = 0
    for function, read, made in recorded.calls:
        apart = any(word in str(function) for word in ("aten.mm", "addmm", "scatter_", "empty"))
        if not (apart or function.is_view):
            pairs = [t for t in (*read, *made) if 384 in t.shape and t.numel() == 96 * 384]
            moved += sum(t.nbytes for t in pairs)
    assert moved <= 117 * 96 * 384


def test_loss__gradient_scales_and_needs_z_only():
    z, features = clustered_batch()
    features.requires_grad_()
    criterion = PPAPLoss(**COEFFICIENTS)
    anchors = criterion.sample_anchors(len(z), torch.Generator().manual_seed(1))
    (once,) = torch.autograd.grad(criterion(z, features, anchors).loss, z)
    (scaled,) = torch.autograd.grad(2048 * criterion(z, features, anchors).loss, z)
    torch.testing.assert_close(scaled, 2048 * once)
    criterion(z, features, anchors).loss.backward()
    assert features.grad is None
    assert not criterion(z.detach(), features, anchors).loss.requires_grad


def test_loss__float16_operands_round_before_the_boundary():
    """cos = 0.60012 lies above 0.60011; the nearest float16, 0.60009765625, lies below."""
    cosine = 0.6001201
    columns = [[1.0, cosine], [0.0, math.sqrt(1 - cosine**2)]]
    features = torch.tensor(columns)[None, :, None]  # (1, 2, 1, 2)
    z = torch.eye(2)
    chosen = COEFFICIENTS | {"initialcrit_pos": 0.60011, "prop_iter": 0, "trainpatchsplit": 1}
    anchors = torch.tensor([[0]])
    assert PPAPLoss(**chosen)(z, features, anchors).num_positives == 1
    assert PPAPLoss(**chosen, products="split")(z, features, anchors).num_positives == 1
    assert PPAPLoss(**chosen, similarity_dtype=torch.float16)(z, features, anchors).num_positives == 0
    assert PPAPLoss(**chosen, products="float16")(z, features, anchors).num_positives == 0


@pytest.mark.parametrize(
    "change", [{"products": "bfloat16"}, {"products": "split", "similarity_dtype": torch.float16}]
)
def test_products__that_do_not_exist(change):
    with pytest.raises(ValueError, match=f"products is {change['products']}"):
        PPAPLoss(**COEFFICIENTS | change)


@pytest.mark.parametrize("name", ["tau", "sigma_pos", "trainpatchsplit", "group_size", "chunk_size"])
def test_loss__wrong_arguments(name):
    with pytest.raises(ValueError, match=f"{name} is 0, must be above 0"):
        PPAPLoss(**COEFFICIENTS | {name: 0})
    with pytest.raises(ValueError, match=r"must be .* with N = B"):
        PPAPLoss(**COEFFICIENTS)(torch.zeros(7, 3), torch.zeros(1, 4, 2, 4))


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch < 2.9")
@pytest.mark.parametrize(
    "place", [None, torch.backends.cuda.matmul, torch.backends], ids=["old", "products", "all"]
)
@pytest.mark.parametrize("high", [False, True])
def test_ieee_float32__old_and_new_settings(place, high):
    """torch raises where the old settings are read after the new ones were set; see `ieee_float32`."""
    operators = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv)
    places = (torch.backends, torch.backends.cudnn, *operators)
    untouched = [each.fp32_precision for each in places]
    try:
        if high:
            torch.set_float32_matmul_precision("high")
        if place is not None:
            place.fp32_precision = "tf32"
        before = [each.fp32_precision for each in places]
        for _ in range(2):
            with ieee_float32():
                assert [operator.fp32_precision for operator in operators] == ["ieee"] * 3
                assert torch.get_float32_matmul_precision() == "highest"
            assert [each.fp32_precision for each in places] == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for each, precision in zip(places, untouched, strict=True):
            each.fp32_precision = precision


def test_sampling__range_no_repeats_and_per_group():
    drawn = [
        PPAPLoss(**COEFFICIENTS).sample_anchors(16 * 3 + 7, torch.Generator().manual_seed(k))
        for k in range(80)
    ]
    assert drawn[0].shape == (4, 4)
    assert drawn[0].dtype == torch.int64
    for group, row in enumerate(drawn[0].tolist()):
        indices = [index for index in row if index >= 0]
        assert len(set(indices)) == len(indices) == (4 if group < 3 else 1)  # 16 // 4, and 7 // 4
        assert all(16 * group <= index < min(16 * group + 16, 55) for index in indices)
    assert {int(i) for anchors in drawn for i in anchors[0]} == set(range(16))


def test_sampling__of_a_group_depends_on_the_generator_alone():
    few, many = (
        PPAPLoss(**COEFFICIENTS).sample_anchors(patches, torch.Generator().manual_seed(5))
        for patches in (80, 160)
    )
    assert torch.equal(few, many[:5])
