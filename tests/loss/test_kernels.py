"""`split` keeps float32's accuracy and sets; the compiled functions compute what the eager ones do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from loss import PPAPLoss, ieee_float32
from loss.contrastive import masked_contrastive, weighted_contrastive
from loss.kernels import UNIT, compare, matmul, operands
from loss.propagation import _members, propagate, select_sets
from model.backbone import BackboneSpec, FrozenViT
from model.weights import load_backbone
from tests.loss.oracle import oracle_propagation
from utils.vision.transforms import normalise

DTYPES = {"float32": torch.float32, "split": torch.float32, "float16": torch.float16}  # what is rounded to


def units(count, dim, seed):
    """Unit vectors around one direction."""
    drawn = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=drawn) + 0.5, dim=1)


@pytest.mark.parametrize("dim", [48, 384, 768])
def test_split__similarities_are_as_exact_as_those_of_float32(dim):
    bank, proxies = units(3000, dim, 0), units(300, dim, 1)
    exact = proxies.double() @ bank.double().T  # (A, N)
    left, right = operands(proxies, "split", left=True), operands(bank, "split")
    represented = left.double() @ right.double().T / UNIT**2  # no rounding of sums
    assert (represented - exact).abs().max() <= 1.2e-7
    error, reference = (
        (compare(proxies, operands(bank, products), torch.float32).double() - exact).abs()
        for products in ("split", "float32")
    )
    assert error.max() <= 1.5 * reference.max()
    assert error.square().mean() <= 1.5**2 * reference.square().mean()


@pytest.mark.parametrize("dim", [48, 384])
def test_split__sums_of_positives_are_as_exact_as_those_of_float32(dim):
    bank = units(3000, dim, 0)
    inside = (torch.rand(200, 3000, generator=torch.Generator().manual_seed(2)) < 0.3).float()  # (A, N)
    exact = F.normalize(inside.double() @ bank.double(), dim=1)  # (A, D)
    parts = matmul(inside.half(), operands(bank, "split")[:, : 2 * dim]).unflatten(1, (-1, dim))  # (A, 2, D)
    errors = [
        (F.normalize(sums, dim=1).double() - exact).abs().max()
        for sums in (parts.sum(dim=1), matmul(inside, bank))
    ]
    assert errors[0] <= 1.5 * errors[1]


def exact_sets(bank, index, coefficients):
    """P and Q of the anchors at `index`, (2, A, N), by the definition in float64."""
    reached = [oracle_propagation(bank, i, **coefficients) for i in index.tolist()]
    sets = [torch.stack([similarity > phi, similarity < psi]) for similarity, phi, psi, _, _ in reached]
    return torch.stack(sets, dim=1).scatter_(2, index.repeat(2, 1)[:, :, None], False)


@pytest.mark.slow
def test_split__sets_of_real_features(shared):
    """Memberships that differ from float64's: hardly any, where float16 changes thousands."""
    spec = BackboneSpec(dim=384, depth=10, heads=6, patch=14, native_res=518, layer_scale=True)
    backbone = FrozenViT(spec)
    load_backbone(backbone, str(shared / "data/weights/vits14_depth10.pth"))
    paths = sorted((shared / "data/camvid/imgs/val").iterdir())[::3]
    images = [np.asarray(Image.open(path).convert("RGB").resize((224, 224))) for path in paths]
    batch = normalise(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))  # (B, 3, H, W)
    features = torch.cat([backbone.last_features(backbone.tokens(part), (16, 16)) for part in batch.split(8)])
    flips = dict.fromkeys(DTYPES, 0)
    shared = {"sigma_pos": 3, "sigma_amb": 3, "trainpatchsplit": 16, "tau": 0.8, "group_size": 256}
    for phi, psi, steps in ((0.55, 0.2, 2), (0.6, 0.2, 3), (0.8, 0.3, 2)):
        coefficients = shared | {"initialcrit_pos": phi, "initialcrit_amb": psi, "prop_iter": steps}
        criterion = PPAPLoss(**coefficients)
        bank = criterion.bank(features)  # (N, D)
        index = criterion.sample_anchors(len(bank), torch.Generator().manual_seed(0)).flatten()  # (A,)
        wanted = exact_sets(bank.double(), index, coefficients)
        for products, dtype in DTYPES.items():
            rounded = bank.to(dtype).float()
            boundaries = replace(criterion.boundaries, operand=dtype)
            reached = propagate(rounded[index], operands(rounded, products), boundaries)
            sets = select_sets(reached, index)
            flips[products] += (torch.stack([sets.positives, sets.negatives]) != wanted).sum().item()
    print(f"flips of {3 * wanted.numel()}: {flips}")
    assert flips["split"] <= 2 * flips["float32"] + 10 <= 1e-6 * 3 * wanted.numel()
    assert flips["float16"] > 20 * flips["split"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused__compiled_equals_eager(backend, dtype):
    drawn = torch.Generator().manual_seed(0)
    similarity, logits = (torch.randn(20, 300, generator=drawn) for _ in range(2))
    phi, grad = torch.rand(20, 1, generator=drawn), torch.rand(20, 1, generator=drawn)
    positives, negatives = similarity > phi, similarity < -phi
    positives[0] = False  # an anchor without positives
    calls = [(_members, similarity, phi, dtype)]
    calls += [(masked_contrastive, logits, positives, negatives, 0.5, grad, dtype)]
    calls += [(weighted_contrastive, logits, positives.to(dtype), positives | negatives, grad[:, 0])]
    torch.compiler.reset()
    for function, first, *others in calls:
        compiled = torch.compile(function.__wrapped__, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(first.clone(), *others), function(first.clone(), *others))


@pytest.mark.gpu
@pytest.mark.parametrize("products", ["split", "float16"])
def test_matmul__tensor_cores_equal_the_emulation(products):
    bank, proxies = operands(units(5000, 384, 0), products), units(300, 384, 1)
    with ieee_float32():
        found = compare(proxies.cuda(), bank.cuda(), DTYPES[products]).cpu()
    torch.testing.assert_close(found, compare(proxies, bank, DTYPES[products]), rtol=0, atol=5e-7)
