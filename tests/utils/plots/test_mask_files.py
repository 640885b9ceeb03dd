"""Ids of masks, result folders and mask files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.plots.mask_files import (
    class_ids,
    cluster_ids,
    contours,
    overlay,
    read_names,
    result_folders,
    write_mask,
    write_overlay,
)
from utils.vision.labels import LabelSpace

LABELS = LabelSpace(("road", "sky", "tree"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
IDS = class_ids(LabelSpace(("dark", "bright"), ((200, 0, 0), (0, 0, 200))))


def test_cluster_ids__matched_take_their_class_and_others_follow():
    ids = cluster_ids(LABELS, 5, assignment=[2, -1, 0, 1, 255])
    assert ids.of_prediction == (2, 3, 0, 1, 4)
    assert ids.names == ("road", "sky", "tree", "cluster 1", "cluster 4")
    assert ids.palette[:3] == LABELS.palette
    assert len(set(ids.palette)) == 5


def test_cluster_ids__up_to_256():
    assert len(cluster_ids(LABELS, 256, assignment=None).palette) == 256
    with pytest.raises(UserError, match="at most 256"):
        cluster_ids(LABELS, 257, assignment=None)


def test_names__from_text_and_file(tmp_path):
    assert read_names("0=road, 2=a = b") == {0: "road", 2: "a = b"}
    (tmp_path / "names.json").write_text(json.dumps({"1": "sky, blue"}))
    assert read_names(str(tmp_path / "names.json")) == {1: "sky, blue"}
    assert class_ids(LABELS).renamed({0: "tree"}).names == ("tree", "sky", "tree")
    with pytest.raises(UserError) as error:
        read_names("0,x=y,1=,2=a,2=b,-1=c")
    assert len(error.value.mistakes) == 5


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_folders__are_nested_and_distinct(tmp_path):
    names = ["a.jpg", "a.png", "b/a.jpg", "c.JPG", "C.png", "d.tif", "a.jpg.png"]
    touch(tmp_path / "in", *names, ".hidden/c.png", "walk.mp4")
    folders = result_folders(tmp_path / "in", Path("out"))
    found = {str(file.relative_to(tmp_path / "in")): str(folder) for file, folder in folders.items()}
    kept = {"b/a.jpg": "out/b/a", "d.tif": "out/d"}
    assert found == {name: kept.get(name, f"out/{name}") for name in names}
    assert result_folders(tmp_path / "in/d.tif", Path("out")) == {tmp_path / "in/d.tif": Path("out/d")}


def test_folders__results_are_no_photographs(tmp_path):
    touch(tmp_path / "in", "in.jpg", "masks/in/mask.png")
    assert list(result_folders(tmp_path / "in", tmp_path / "in/masks")) == [tmp_path / "in/in.jpg"]
    with pytest.raises(UserError, match="the folder of the photographs"):
        result_folders(tmp_path / "in", tmp_path / "in")
    touch(tmp_path / "in", "mask.png")
    with pytest.raises(UserError, match=r"in/mask.png is a photograph"):
        result_folders(tmp_path / "in", tmp_path)


def test_folders__without_an_image(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        result_folders(tmp_path / "nowhere", tmp_path / "out")
    touch(tmp_path / "films", "walk.mp4")
    with pytest.raises(UserError, match=r"no image .*ffmpeg -i walk.mp4"):
        result_folders(tmp_path / "films", tmp_path / "out")


def test_mask__has_ids_and_palette(tmp_path):
    classes = np.array([[0, 1], [1, 1]], dtype=np.uint8)
    write_mask(tmp_path / "mask.png", classes, IDS)
    mask = Image.open(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(mask), classes)
    assert mask.getpalette()[:6] == [200, 0, 0, 0, 0, 200]


def test_overlay__is_tinted_with_contours(tmp_path):
    image = Image.fromarray(np.full((4, 6, 3), 100, dtype=np.uint8))
    classes = np.repeat([[0, 0, 0, 1, 1, 1]], 4, axis=0).astype(np.uint8)
    pixels = np.asarray(overlay(image, classes, ids=IDS))
    assert pixels[0].tolist() == [[150, 50, 50]] * 2 + [[255] * 3] + [[50, 50, 150]] * 3
    large = image.resize((4500, 30))
    write_overlay(tmp_path / "x.jpg", large, np.zeros((30, 4500), dtype=np.uint8), ids=IDS)
    assert Image.open(tmp_path / "x.jpg").size == (2048, 14)


def test_contours__not_around_specks():
    classes = np.zeros((60, 80), dtype=np.uint8)
    classes[10, 10:12] = 1  # 2 pixels of 4,800
    assert not contours(classes).any()
    classes[30:50, 30:50] = 1
    assert contours(classes).sum() == 4 * 20 - 1  # a corner is on two sides
