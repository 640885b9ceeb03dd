import json
import math

import numpy as np
import pytest
import torch

from utils.vision.metrics import confusion, score


def test_metrics__golden(golden):
    stored = golden("metrics")
    expected = json.loads(stored.metrics)
    for name, matched in (("Linear", False), ("Cluster", True)):
        batches = [(getattr(stored, f"{name.lower()}{k}"), getattr(stored, f"target{k}")) for k in "012"]
        scores = score(sum(confusion(*batch, (6, 6)) for batch in batches), matched=matched)
        assert scores.accuracy == pytest.approx(expected[f"{name}_Accuracy"], abs=1e-4)
        assert scores.miou == pytest.approx(expected[f"{name}_mIoU"], abs=1e-4)


def test_score__hungarian_matches_clusters_on_counts():
    scores = score(np.array([[1, 9, 0], [8, 1, 1], [0, 2, 7]]), matched=True)
    assert scores.assignment == (1, 0, 2)
    assert scores.accuracy == pytest.approx(100 * 24 / 29)


def test_score__unmatched_clusters_are_misses():
    """Every pixel of class 1 in an extra cluster: the published metric would drop them and report 100."""
    scores = score(np.array([[10, 0, 0], [0, 6, 4]]), matched=True)
    assert scores.accuracy == pytest.approx(80)
    assert scores.iou == pytest.approx((100, 60))
    assert scores.assignment == (0, 1, -1)
    assert scores.confusion.tolist() == [[10, 0, 0], [0, 6, 4]]


def test_score__class_with_an_empty_union_is_left_out():
    scores = score(np.array([[5, 0, 0], [0, 0, 0], [1, 0, 4]]), matched=False)
    assert math.isnan(scores.iou[1])
    assert scores.miou == pytest.approx((100 * 5 / 6 + 80) / 2)


def test_score__nothing_counted():
    assert score(np.zeros((3, 3)), matched=True) is None


def test_confusion__ignores_labels_outside_the_classes():
    found = confusion(torch.tensor([[0, 1, 2, 2, 1]]), torch.tensor([[0, 1, -1, 2, 255]]), (2, 3))
    assert found.tolist() == [[1, 0, 0], [0, 1, 0]]
