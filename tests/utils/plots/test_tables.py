import json

from utils.plots.report import write_sweep
from utils.plots.tables import class_table, metrics_markdown, metrics_table, sets_table, sweep_table

FOUR = {"Cluster_Accuracy": 50.0, "Cluster_mIoU": 20.0, "Linear_Accuracy": 80.0, "Linear_mIoU": 40.0}


IOU = {"cluster": {"sky": 10.0, "road": float("nan")}, "linear": {"sky": 30.0, "road": 50.0}}


def result(shift=0.0, **changes):
    metrics = {name: value + shift for name, value in FOUR.items()}
    stages = {"before_crf": metrics, "after_crf": None, "after_crf_missing": "no compiler"}
    return stages | {"class_iou": {"before_crf": IOU, "after_crf": None}} | changes


def fits(table):
    assert max(map(len, table.splitlines())) <= 80
    return table.splitlines()


def test_metrics_table__accuracy_and_miou_before_and_after_crf():
    run = result(after_crf=FOUR, last_step=result(-3.0), after_crf_missing=None)
    lines = fits(metrics_table({"a-long-name" * 5: run}))
    assert lines[2] == "a-long-name" * 5 + ", before CRF"
    assert lines[3].split() == ["50.0", "/", "20.0", "80.0", "/", "40.0"]
    assert lines[7].split() == ["47.0", "/", "17.0", "77.0", "/", "37.0"]
    assert len(lines) == 8  # header, rule and three rows with a line for the name
    assert metrics_table({"run": result()}).endswith("run, after CRF: no compiler")


def test_metrics_table__without_labels_shows_how_the_pixels_split():
    table = metrics_table({"run": result(before_crf=None, cluster_shares={"3": 70.0, "0": 30.0})})
    assert table == "run: cluster sizes in these images, in percent: 3: 70.0, 0: 30.0"


def test_class_table__before_and_after_crf_and_missing_values():
    lines = fits(class_table(result(class_iou={"before_crf": IOU, "after_crf": IOU})))
    assert lines[0].split("  ")[-2:] == ["cluster -> CRF", "linear -> CRF"]
    assert lines[2].split() == ["sky", "10.0", "->", "10.0", "30.0", "->", "30.0"]
    assert lines[3].split()[1:4] == ["-", "->", "-"]


def test_metrics_markdown__has_both_tables():
    lines = metrics_markdown(result()).splitlines()
    assert {"| before CRF | 50.0 | 20.0 | 80.0 | 40.0 |", "| sky | 10.0 | 30.0 |"} <= {*lines}


def test_sweep_table__mean_and_sample_deviation_over_seeds():
    lines = fits(sweep_table([("T=0", result(-1.0)), ("T=0", result(1.0)), ("T=1", result())]))
    assert lines[2].startswith("T=0, before CRF")
    assert "50.0 ± 1.4" in lines[2]  # sqrt(2)
    assert lines[3].split()[3] == "1"


def test_sets_table__one_row_per_step():
    row = dict.fromkeys(("precision", "recall", "purity", "positives", "negatives", "ambiguous"), 12.34)
    assert fits(sets_table([row, row]))[-1].split() == ["1", *["12.3"] * 6]


def test_sweep__without_labels_says_so(tmp_path):
    unlabelled = {"name": "a", "before_crf": None, "after_crf": None, "trainable_parameters": 7}
    rows = [("T=0", unlabelled), ("T=1", unlabelled | {"trainable_parameters": 8})]
    assert sweep_table(rows).startswith("no labels, so no metrics\n\n")
    write_sweep(tmp_path, rows, title="x")
    assert (tmp_path / "sweep.md").read_text() == "no labels, so no metrics\n"
    page = (tmp_path / "report.html").read_text()
    assert "No labels" in page
    assert "<table>" not in page


def test_write_sweep__numbers_table_figure_and_page(tmp_path):
    rows = [("a", result(name="x=1")), ("a", result(1.0)), ("b", result(before_crf=None))]
    (tmp_path / "x=1").mkdir()
    (tmp_path / "x=1/report.html").touch()
    write_sweep(tmp_path / "sweep", rows, title="x")
    rows = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert rows[1]["before_crf"]["Cluster_mIoU"] == 21.0
    page = (tmp_path / "sweep/report.html").read_text()
    assert 'href="../x%3D1/report.html"' in page
    assert "50.5 ± 0.7" in page
    assert "50.5 ± 0.7" in (tmp_path / "sweep/sweep.md").read_text()
