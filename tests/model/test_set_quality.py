import math

import pytest
import torch

from loss.propagation import Boundaries
from model.set_quality import patch_classes, set_quality

# four patches on a circle: two near each other, one at 60 degrees, one opposite
ANGLES = torch.tensor([0.0, 10.0, 60.0, 180.0]) * math.pi / 180
BANK = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # (4, 2)
STILL = Boundaries(phi=0.9, psi=0.2, steps=0, sigma_pos=math.inf, sigma_amb=math.inf)


def quality(classes, anchors=(0,), boundaries=STILL):
    return set_quality(BANK, torch.tensor(classes), anchors=torch.tensor(anchors), boundaries=boundaries)


def test_set_quality__by_hand():
    """Anchor 0: positive 1, ambiguous 2, negative 3; of its class are 1 and 2."""
    (found,) = quality([5, 5, 5, 7])
    assert found.means() == pytest.approx(
        {
            "precision": 100.0,
            "recall": 50.0,
            "purity": 100.0,
            "positives": 100 / 3,
            "negatives": 100 / 3,
            "ambiguous": 100 / 3,
            "chance": 200 / 3,
        }
    )


def test_set_quality__wrong_positives_and_negatives():
    (found,) = quality([5, 7, 7, 5])
    means = found.means()
    assert (means["precision"], means["recall"], means["purity"]) == (0, 0, 0)


def test_set_quality__ignored_patches_are_neither_anchors_nor_counted():
    (found,) = quality([5, 255, 5, 7], anchors=(0, 1))
    means = found.means()
    assert math.isnan(means["precision"])  # the one positive is ignored
    assert (means["recall"], means["purity"], means["negatives"]) == (0, 100, 50)
    assert found.counts.max() == 1


def test_set_quality__one_entry_a_step_and_sums_over_batches():
    boundaries = Boundaries(phi=0.9, psi=0.2, steps=2, sigma_pos=0.01, sigma_amb=math.inf)
    found = quality([5, 5, 5, 7], boundaries=boundaries)
    assert len(found) == 3
    assert found[0].means()["recall"] == 50
    assert found[2].means()["recall"] == 100  # the boundary has sunk below 60 degrees
    both = found[0] + quality([5, 7, 7, 5])[0]
    assert both.means()["precision"] == 50


def test_set_quality__where_the_edges_cross_a_positive_is_no_negative():
    crossed = Boundaries(phi=0.0, psi=1.1, steps=0, sigma_pos=math.inf, sigma_amb=math.inf)
    means = quality([5, 5, 5, 7], boundaries=crossed)[0].means()
    assert means["positives"] + means["negatives"] == pytest.approx(100)
    assert means["ambiguous"] == 0


def test_set_quality__compares_as_the_loss_does():
    """A float16 proxy may fall on the other side of a boundary."""
    rows = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    bank = torch.nn.functional.normalize(rows, dim=1)
    rounded = bank[0].half().float() @ bank[1]
    edge = (bank[0] @ bank[1] + rounded).item() / 2  # between what float32 and float16 say of patch 1
    asked = {
        "anchors": torch.tensor([0]),
        "boundaries": Boundaries(edge, -2.0, 0, math.inf, math.inf),
    }
    classes = torch.zeros(400, dtype=torch.int64)
    (half,) = set_quality(bank, classes, operand=torch.float16, **asked)
    (full,) = set_quality(bank, classes, **asked)
    assert abs(half.means()["positives"] - full.means()["positives"]) == pytest.approx(100 / 399)


@pytest.mark.gpu
def test_set_quality__cuda_equals_cpu():
    drawn = torch.Generator().manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(300, 64, generator=drawn) + 1, dim=1)
    classes = torch.randint(0, 5, (300,), generator=drawn)
    classes[classes == 4] = 255
    boundaries = Boundaries(phi=0.6, psi=0.45, steps=2, sigma_pos=3.0, sigma_amb=3.0)
    anchors = torch.arange(0, 300, 7)
    found = [
        set_quality(bank.to(d), classes.to(d), anchors=anchors.to(d), boundaries=boundaries)
        for d in ("cpu", "cuda")
    ]
    for on_cpu, on_cuda in zip(*found, strict=True):
        assert on_cuda.means() == pytest.approx(on_cpu.means(), abs=0.05)


def test_patch_classes__the_commonest_value():
    label = torch.tensor([[3, 3, 255, 255], [3, 0, 255, 2], [1, 1, 0, 0], [1, 2, 0, 0]])
    assert patch_classes(label[None], 2).tolist() == [3, 255, 1, 0]
