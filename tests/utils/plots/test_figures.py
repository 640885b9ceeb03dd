from pathlib import Path

import numpy as np
import pytest

from utils.plots.figures import (
    colour,
    draw_class_iou,
    draw_confusion,
    draw_legend,
    draw_predictions,
    write_strip,
)
from utils.vision.labels import LabelSpace


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_colour__palette_and_missing(dtype):
    labels = LabelSpace(("a", "b"), ((255, 0, 0), (0, 0, 255)))
    painted = colour(np.array([[0, 1], [255, 1]], dtype=dtype), labels)
    assert painted.tolist() == [[[255, 0, 0], [0, 0, 255]], [[0, 0, 0], [0, 0, 255]]]
    assert colour(np.array([[255, 2]]), labels, missing=(1, 2, 3)).tolist() == [[[1, 2, 3], [1, 2, 3]]]


@pytest.mark.filterwarnings("error")  # matplotlib warns of a legend that does not fit
@pytest.mark.parametrize(("n_classes", "images"), [(2, 5), (27, 5), (80, 1)])
def test_figures__few_and_many_classes(tmp_path, n_classes, images):
    """Classes without pixels are allowed, and names may contain $."""
    labels = LabelSpace.with_spread_colours(tuple(f"class {n}" for n in range(n_classes)))
    counts = np.eye(n_classes, n_classes + 1, dtype=np.int64)
    counts[0] = 0
    draw_confusion(tmp_path / "confusion.png", {"cluster": counts, "linear": counts}, labels=labels)
    iou = dict.fromkeys(labels.names, 50.0) | {"class 0": float("nan")}
    draw_class_iou(
        tmp_path / "iou.png", {"cluster, before CRF": iou, "linear, before CRF": iou}, labels=labels
    )
    maps = {"image": np.zeros((4, 4, 3), np.uint8)}
    draw_predictions(tmp_path / "predictions.png", [maps] * images, labels=labels)
    legend = [{"id": n, "name": "$_$", "colour": c, "share": 0.0} for n, c in enumerate(labels.palette)]
    draw_legend(tmp_path / "legend.png", legend)
    for name in ("confusion", "iou", "predictions", "legend"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "draw",
    [lambda path: draw_legend(path, []), lambda path: write_strip(path, [np.zeros((4, 4, 3), np.uint8)])],
)
def test_figures__an_interruption_leaves_the_old_file(tmp_path, monkeypatch, draw):
    def interrupted(image, file, **_):
        Path(file).write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "a.png").write_text("old")
    monkeypatch.setattr("PIL.Image.Image.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "a.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
