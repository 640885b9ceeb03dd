import math

import pytest
import torch

from loss.propagation import Boundaries
from model.set_quality import means, patch_classes, set_quality
from utils.vision.labels import IGNORE

# four patches on a circle: two near each other, one at 60 degrees, one opposite
ANGLES = torch.tensor([0.0, 10.0, 60.0, 180.0]) * math.pi / 180
BANK = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # (4, 2)
FIXED = Boundaries(phi=0.9, psi=0.2, steps=0, sigma_pos=math.inf, sigma_amb=math.inf)


def quality(classes, anchors=(0,), boundaries=FIXED):
    return set_quality(BANK, torch.tensor(classes), anchors=torch.tensor(anchors), boundaries=boundaries)


def test_set_quality__by_hand():
    """Anchor 0: patch 1 is positive, 2 ambiguous, 3 negative; 1 and 2 have its class."""
    third = 100 / 3
    sizes = {"positives": third, "negatives": third, "ambiguous": third, "chance": 2 * third}
    (found,) = means(quality([5, 5, 5, 7]))
    assert found == pytest.approx({"precision": 100, "recall": 50, "purity": 100, **sizes})
    (wrong,) = means(quality([5, 7, 7, 5]))
    assert (wrong["precision"], wrong["recall"], wrong["purity"]) == (0, 0, 0)


def test_set_quality__ignored_patches_are_neither_anchors_nor_counted():
    totals = quality([5, IGNORE, 5, 7], anchors=(0, 1))
    (found,) = means(totals)
    assert math.isnan(found["precision"])  # the only positive is ignored
    assert (found["recall"], found["purity"], found["negatives"]) == (0, 100, 50)
    assert totals[0, 1].max() == 1


def test_set_quality__of_each_step_and_summed_over_batches():
    boundaries = Boundaries(phi=0.9, psi=0.2, steps=2, sigma_pos=0.01, sigma_amb=math.inf)
    found = means(quality([5, 5, 5, 7], boundaries=boundaries))
    assert [row["recall"] for row in found][::2] == [50, 100]  # the boundary has sunk below 60 degrees
    assert means(quality([5, 5, 5, 7]) + quality([5, 7, 7, 5]))[0]["precision"] == 50


def test_set_quality__a_patch_of_both_sets_is_positive():
    crossed = Boundaries(phi=0.0, psi=1.1, steps=0, sigma_pos=math.inf, sigma_amb=math.inf)
    (found,) = means(quality([5, 5, 5, 7], boundaries=crossed))
    assert found["positives"] + found["negatives"] == pytest.approx(100)


def test_patch_classes__are_the_most_frequent():
    label = torch.tensor([[3, 3, 255, 255], [3, 0, 255, 2], [1, 1, 0, 0], [1, 2, 255, 255]])
    assert patch_classes(label[None], 2, n_classes=4).tolist() == [3, IGNORE, 1, IGNORE]  # ignore wins a tie
