from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from utils.plots.figures import colour, draw_class_iou, draw_confusion, draw_predictions, save_figure
from utils.vision.labels import LabelSpace


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_colour__palette_and_missing(dtype):
    labels = LabelSpace(("a", "b"), ((255, 0, 0), (0, 0, 255)))
    painted = colour(np.array([[0, 1], [255, 1]], dtype=dtype), labels)
    assert painted.tolist() == [[[255, 0, 0], [0, 0, 255]], [[0, 0, 0], [0, 0, 255]]]
    assert colour(np.array([[255, 2]]), labels, missing=(1, 2, 3)).tolist() == [[[1, 2, 3], [1, 2, 3]]]


@pytest.mark.filterwarnings("error")  # matplotlib warns of a legend that does not fit
@pytest.mark.parametrize(("n_classes", "images"), [(2, 5), (80, 1)])
def test_figures__few_and_many_classes(tmp_path, n_classes, images):
    """Classes without pixels are allowed."""
    labels = LabelSpace.with_spread_colours(tuple(f"class {n}" for n in range(n_classes)))
    counts = np.eye(n_classes, n_classes + 1, dtype=np.int64)
    counts[0] = 0
    iou = dict.fromkeys(labels.names, 50.0) | {"class 0": float("nan")}
    draw_confusion(tmp_path / "a.png", {"cluster": counts, "linear": counts}, labels=labels)
    draw_class_iou(tmp_path / "b.png", {"cluster": iou, "linear": iou}, labels=labels)
    draw_predictions(tmp_path / "c.png", [{"image": np.zeros((4, 4, 3), np.uint8)}] * images, labels=labels)
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in "abc")


def test_figures__an_interruption_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupted(image, file, **_):
        Path(file).write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "a.png").write_text("old")
    monkeypatch.setattr("PIL.Image.Image.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_figure(plt.figure(), tmp_path / "a.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
