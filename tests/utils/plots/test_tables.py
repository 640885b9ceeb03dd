import json

import numpy as np
import pytest
from PIL import Image

from utils.plots.figures import colour, draw_class_iou, draw_confusion, draw_predictions
from utils.plots.tables import class_table, metrics_table, sets_table, sweep_table, write_sweep
from utils.vision.labels import LabelSpace

FOUR = {"Cluster_Accuracy": 50.0, "Cluster_mIoU": 20.0, "Linear_Accuracy": 80.0, "Linear_mIoU": 40.0}


def result(shift=0.0, **changes):
    metrics = {name: value + shift for name, value in FOUR.items()}
    iou = {"cluster": {"sky": 10.0, "road": float("nan")}, "linear": {"sky": 30.0, "road": 50.0}}
    return {
        "before_crf": metrics,
        "after_crf": None,
        "after_crf_missing": "no compiler",
        "class_iou": {"before_crf": iou, "after_crf": None},
    } | changes


def test_metrics_table__says_why_crf_is_missing():
    table = metrics_table({"run": result()})
    assert "| run, before CRF |" in table
    assert "50.0" in table
    assert "run, after CRF: no compiler" in table


def test_metrics_table__without_labels():
    assert "| run, before CRF |                - |" in metrics_table({"run": result(before_crf=None)})


def test_class_table__names_and_gaps():
    lines = class_table({"run": result()}).splitlines()
    assert lines[0].split("|")[1:4] == [" IoU  ", " run cluster ", " run linear "]
    assert lines[3].split("|")[2].strip() == "-"


def test_sweep_table__mean_and_sample_deviation_over_seeds():
    table = sweep_table([("T=0", result(-1.0)), ("T=0", result(1.0)), ("T=1", result())])
    assert "| T=0, before CRF |    2 |" in table
    assert "50.0 ± 1.4" in table  # sqrt(2)
    assert "| T=1, before CRF |    1 |" in table


def test_pictures__are_written_in_the_palette(tmp_path):
    labels = LabelSpace(("a", "b"), ((255, 0, 0), (0, 0, 255)))
    painted = colour(np.array([[0, 1], [255, 1]]), labels)
    assert painted.tolist() == [[[255, 0, 0], [0, 0, 255]], [[0, 0, 0], [0, 0, 255]]]
    draw_predictions(tmp_path / "p.png", [{"image": painted, "truth": painted}] * 2, labels=labels)
    draw_confusion(tmp_path / "c.png", {"cluster": np.array([[1, 2, 3], [4, 5, 0]])}, labels=labels)
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_metrics_table__shows_the_last_step_beside_the_best():
    table = metrics_table({"run": result(last_step=result(-3.0))})
    assert "| run, last step, before CRF |" in table
    assert "47.0" in table


def test_sets_table__one_row_a_step():
    row = dict.fromkeys(("precision", "recall", "purity", "positives", "negatives", "ambiguous"), 12.34)
    assert sets_table([row, row]).splitlines()[3].startswith("| 1 |")
    assert "12.3" in sets_table([row])


def test_write_sweep__numbers_and_a_figure(tmp_path):
    write_sweep(tmp_path / "sweep", [("a", result()), ("a", result(1.0)), ("b", result(before_crf=None))])
    rows = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [row["setting"] for row in rows] == ["a", "a", "b"]
    assert rows[1]["before_crf"]["Cluster_mIoU"] == 21.0
    assert (tmp_path / "sweep/sweep.png").stat().st_size > 1000


@pytest.mark.parametrize("n_classes", [2, 11, 27])
def test_pictures__of_any_number_of_classes(tmp_path, n_classes):
    """Many classes have their confusions one below another; a class without a pixel is no mistake."""
    labels = LabelSpace.with_spread_colours(tuple(f"class {n}" for n in range(n_classes)))
    counts = np.eye(n_classes, n_classes + 1, dtype=np.int64)
    counts[0] = 0
    draw_confusion(tmp_path / "confusion.png", {"cluster": counts, "linear": counts}, labels=labels)
    iou = dict.fromkeys(labels.names, 50.0) | {"class 0": float("nan")}
    draw_class_iou(
        tmp_path / "iou.png", {"cluster, before CRF": iou, "linear, before CRF": iou}, labels=labels
    )
    maps = {"image": np.zeros((4, 4, 3), np.uint8)}
    draw_predictions(tmp_path / "predictions.png", [maps] * 5, labels=labels)
    width, height = Image.open(tmp_path / "confusion.png").size
    assert (width < height) == (n_classes == 27)
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("iou", "predictions"))
