import json

from utils.plots.tables import class_table, metrics_table, sets_table, sweep_table, write_sweep

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


def test_metrics_table__without_labels():
    assert "| run, before CRF |                - |" in metrics_table({"run": result(before_crf=None)})


def test_class_table__missing_values():
    lines = class_table({"run": result()}).splitlines()
    assert lines[0].split("|")[1:4] == [" IoU  ", " run cluster ", " run linear "]
    assert lines[3].split("|")[2].strip() == "-"


def test_sweep_table__mean_and_sample_deviation_over_seeds():
    table = sweep_table([("T=0", result(-1.0)), ("T=0", result(1.0)), ("T=1", result())])
    assert "| T=0, before CRF |    2 |" in table
    assert "50.0 ± 1.4" in table  # sqrt(2)
    assert "| T=1, before CRF |    1 |" in table


def test_sets_table__one_row_per_step():
    row = dict.fromkeys(("precision", "recall", "purity", "positives", "negatives", "ambiguous"), 12.34)
    assert sets_table([row, row]).splitlines()[3].startswith("| 1 |")
    assert "12.3" in sets_table([row])


def test_write_sweep__numbers_and_figure(tmp_path):
    write_sweep(tmp_path / "sweep", [("a", result()), ("a", result(1.0)), ("b", result(before_crf=None))])
    rows = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [row["setting"] for row in rows] == ["a", "a", "b"]
    assert rows[1]["before_crf"]["Cluster_mIoU"] == 21.0
    assert (tmp_path / "sweep/sweep.png").stat().st_size > 1000
