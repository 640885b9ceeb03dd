"""Ids of masks, result folders and mask files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.plots.mask_files import ResultFiles, overlay, renamed, result_files, write_results
from utils.vision.labels import LabelSpace

LABELS = LabelSpace(("road", "sky", "tree"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
PALETTE = [(200, 0, 0), (0, 0, 200)]


def test_names__from_text_and_file(tmp_path):
    assert renamed(LABELS.names, "0=road, 2=a = b") == ["road", "sky", "a = b"]
    (tmp_path / "names.json").write_text(json.dumps({"1": "sky, blue"}))
    assert renamed(LABELS.names, str(tmp_path / "names.json"))[1] == "sky, blue"
    with pytest.raises(UserError) as error:
        renamed(LABELS.names, "0,x=y,1=,3=a,-1=c")
    assert len(error.value.mistakes) == 5


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_folders__are_nested_and_distinct(tmp_path):
    names = ["a.jpg", "a.png", "b/a.jpg", "c.JPG", "C.png", "d.tif"]
    touch(tmp_path / "in", *names, ".hidden/c.png", "walk.mp4", "masks/d/mask.png", "masks/d/overlay.jpg")
    out, kept = tmp_path / "in/masks", {"b/a.jpg": "b/a", "d.tif": "d"}
    files = result_files(tmp_path / "in", out)
    found = {str(file.relative_to(tmp_path / "in")): str(each.mask.parent) for file, each in files.items()}
    assert found == {name: str(out / kept.get(name, name)) for name in names}
    touch(tmp_path / "one", "legend.png")  # whose folder must not be where the legend is written
    (only,) = result_files(tmp_path / "one", out).values()
    assert only.mask == out / "legend/mask.png"
    single = ResultFiles(Path("out/d/mask.png"), Path("out/d/overlay.jpg"))
    assert result_files(tmp_path / "in/d.tif", Path("out")) == {tmp_path / "in/d.tif": single}


def test_flat__names_are_joined_and_distinct(tmp_path):
    touch(tmp_path / "in", "a.jpg", "b/a.jpg", "b_a.png", "c/d.tif", "legend.jpg")
    files = result_files(tmp_path / "in", tmp_path / "out", flat=True)
    masks = sorted(each.mask.relative_to(tmp_path / "out").as_posix() for each in files.values())
    assert masks == ["a.png", "b_a.jpg.png", "b_a.png.png", "c_d.png", "legend.jpg.png"]
    assert files[tmp_path / "in/c/d.tif"].overlay == tmp_path / "out/overlays/c_d.jpg"
    touch(tmp_path / "in", "b_a.jpg")
    with pytest.raises(UserError, match="two photographs would have the same mask"):
        result_files(tmp_path / "in", tmp_path / "out", flat=True)


@pytest.mark.parametrize("images", ["in/one.png", "in/new"])
def test_flat__never_replaces_a_photograph(tmp_path, images):
    touch(tmp_path / "in", "one.png", "new/one.jpg")
    with pytest.raises(UserError, match=r"in/one\.png is no mask"):
        result_files(tmp_path / images, tmp_path / "in", flat=True)
    for out in ("in/masks", "."):
        (files,) = result_files(tmp_path / images, tmp_path / out, flat=True).values()
        write_results(files, Image.new("RGB", (4, 4)), np.zeros((4, 4), np.uint8), PALETTE)
        result_files(tmp_path / images, tmp_path / out, flat=True)  # again


def test_folders__without_an_image(tmp_path):
    touch(tmp_path / "films", "walk.mp4")
    for images, out, words in (
        ("nowhere", "out", "is missing or contains no image$"),
        ("films", "out", r"no image; other files: 1 .mp4; .*ffmpeg -i"),
        ("films", "films", "the folder of the photographs"),
    ):
        with pytest.raises(UserError, match=words):
            result_files(tmp_path / images, tmp_path / out)


def test_results__mask_has_ids_and_overlay_is_reduced(tmp_path):
    classes = np.tile(np.uint8([0, 1]), (30, 2250))
    files = ResultFiles(tmp_path / "x/mask.png", tmp_path / "x/overlay.jpg")
    write_results(files, Image.new("RGB", (4500, 30)), classes, PALETTE)
    mask = Image.open(tmp_path / "x/mask.png")
    assert np.array_equal(np.asarray(mask), classes)
    assert mask.getpalette()[:6] == [200, 0, 0, 0, 0, 200]
    assert Image.open(tmp_path / "x/overlay.jpg").size == (2048, 14)


def test_overlay__is_tinted_with_contours():
    image = Image.fromarray(np.full((60, 80, 3), 100, dtype=np.uint8))
    classes = np.zeros((60, 80), dtype=np.uint8)
    classes[30:50, 30:50] = 1
    pixels = np.asarray(overlay(image, classes, PALETTE))
    for (y, x), colour in {(0, 0): [150, 50, 50], (40, 40): [50, 50, 150], (40, 29): [255] * 3}.items():
        assert pixels[y, x].tolist() == colour
    assert (pixels == 255).all(axis=2).sum() == 4 * 20 - 1  # a corner is on two sides
