"""eval.py --explain, as the command line calls it."""

import json

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from utils.errors import UserError


def explain(path, *words):
    return evaluation.main(["--opt", path, *words])


def test_explain__writes_picture_and_numbers(tiny_file, tmp_path, capsys):
    path = tiny_file(checkpoint="nowhere", training_coeff__prop_iter=1)
    (found,) = explain(path, "--explain", "5", "--patch", "3,0")
    assert (found["patch"], found["grid"], found["images"]) == ([3, 0], [4, 4], 4)
    assert [step["t"] for step in found["steps"]] == [0, 1]
    for step in found["steps"]:
        assert step["positives"] + step["ambiguous"] + step["negatives"] == 4 * 16 - 1
    (centre,) = explain(path, "--explain", "0")
    assert centre["patch"] == [2, 2]
    folder = tmp_path / "output/tiny/explain"
    stored = json.loads((folder / "explain.json").read_text())
    assert stored == {"synthetic_val_scene_5_3_0": found, "synthetic_val_scene_0_2_2": centre}
    for name in stored:
        assert Image.open(folder / f"{name}.png").width > 900
    assert "synthetic val scene 5, patch 3,0" in capsys.readouterr().out


def test_explain__a_file_and_a_sweep(tiny_file, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "my photo.png")
    found = explain(tiny_file(), "--explain", str(tmp_path / "my photo.png"), "training_coeff.prop_iter=0,1")
    assert [len(each["steps"]) for each in found] == [1, 2]
    for name in ("tiny-prop_iter=0", "tiny-prop_iter=1"):
        assert (tmp_path / "output" / name / "explain/my_photo_2_2.png").is_file()


def test_explain__patch_outside_names_the_grid(tiny_file, tmp_path):
    with pytest.raises(UserError, match="--patch is 4,0, but the grid has 4 rows and 4 columns"):
        explain(tiny_file(), "--explain", "0", "--patch", "4,0")
    assert not (tmp_path / "output/tiny/explain").exists()
