"""Which photographs, where their masks go, and what is left behind."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.plots.mask_files import contours, overlay, specks, write_overlay
from utils.plots.mask_ids import class_ids
from utils.plots.photographs import find_photographs, result_names, write_masks
from utils.vision.labels import LabelSpace

IDS = class_ids(LabelSpace(("dark", "bright"), ((200, 0, 0), (0, 0, 200))))


def photo(path, size=(30, 20), value=200):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size[::-1], 3), value, dtype=np.uint8)
    pixels[:, : size[0] // 4] = 10
    Image.fromarray(pixels).save(path)
    return path


def brightness(image):
    return (np.asarray(image)[:, :, 0] > 100).astype(np.uint8)


def test_names__clashes_keep_their_ending():
    files = ["a.jpg", "a.png", "b/a.jpg", "c.JPG", "C.png", "d.tif", "a.jpg.png", "x/mask.png", "legend.png"]
    names = [str(name) for name in result_names([Path(file) for file in files])]
    assert names == [
        "a.jpg", "a.png", "b/a", "c.JPG", "C.png", "d", "a.jpg.png", "x/mask", "legend",
    ]  # fmt: skip
    assert [str(name) for name in result_names([Path("x/mask.png.jpg"), Path("x.jpg")])] == [
        "x/mask.png.jpg", "x",
    ]  # fmt: skip


def test_masks__in_the_folders_of_the_photographs(tmp_path):
    images, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.jpg", "deep/er/b.png", "deep/b.jpg", ".hidden/c.png"):
        photo(images / name)
    done = write_masks(brightness, find_photographs(images, out), out=out, ids=IDS)
    assert (done.images, done.left_out) == (3, ())
    for name in ("a", "deep/er/b", "deep/b"):
        mask = Image.open(out / name / "mask.png")
        assert (mask.mode, mask.size) == ("P", (30, 20))
        assert mask.getpalette()[:6] == [200, 0, 0, 0, 0, 200]
        assert np.array_equal(np.asarray(mask), brightness(Image.open(next(images.glob(f"{name}.*")))))
        assert Image.open(out / name / "overlay.jpg").size == (30, 20)
    legend = json.loads((out / "legend.json").read_text())
    assert legend["ids"][0] == {
        "id": 0,
        "name": "dark",
        "colour": [200, 0, 0],
        "share": pytest.approx(70 / 3),
    }
    assert sum(row["share"] for row in legend["ids"]) == pytest.approx(100)
    assert Image.open(out / "legend.png").width > 100
    assert not list(out.rglob("*.part"))


def test_masks__a_damaged_image_is_left_out_and_the_rest_done(tmp_path):
    photo(tmp_path / "in/a.png")
    (tmp_path / "in/b.png").write_bytes(b"no image")
    photo(tmp_path / "in/c.png")

    def segment(image):
        return brightness(image)

    out = tmp_path / "out"
    done = write_masks(segment, find_photographs(tmp_path / "in", out), out=out, ids=IDS)
    assert done.images == 2
    assert "b.png: not a readable image" in done.left_out[0]
    assert json.loads((out / "legend.json").read_text())["left_out"] == list(done.left_out)
    assert not (out / "b").exists()
    assert (out / "c/mask.png").is_file()


def test_masks__again_replaces_them_and_never_reads_them(tmp_path):
    images, out = tmp_path / "in", tmp_path / "in/masks"
    photo(images / "a.png")
    for _ in range(2):
        found = find_photographs(images, out)
        assert [each.path.name for each in found] == ["a.png"]
        write_masks(brightness, found, out=out, ids=IDS)
    with pytest.raises(UserError, match=r"--out is .*, the folder of the photographs"):
        find_photographs(images, images)


def test_find__one_file_and_what_is_none(tmp_path):
    file = photo(tmp_path / "a.b.png")
    (found,) = find_photographs(file, tmp_path / "out")
    assert found.folder == tmp_path / "out/a.b"
    (tmp_path / "films").mkdir()
    with pytest.raises(UserError, match="which holds no image"):
        find_photographs(tmp_path / "films", tmp_path / "out")
    (tmp_path / "films/walk.mp4").touch()
    for path in ("films", "films/walk.mp4"):
        with pytest.raises(UserError, match=r"ffmpeg -i walk.mp4"):
            find_photographs(tmp_path / path, tmp_path / "out")
    with pytest.raises(UserError, match=r"--images is .*nowhere: no such file or folder"):
        find_photographs(tmp_path / "nowhere", tmp_path / "out")


def test_find__never_writes_upon_a_photograph(tmp_path):
    photo(tmp_path / "in/in.jpg")
    photo(tmp_path / "in/mask.png")
    with pytest.raises(UserError, match=r"in/mask.png is a photograph; choose another"):
        find_photographs(tmp_path / "in", tmp_path)


def test_out__that_cannot_be_written(tmp_path):
    photo(tmp_path / "a.png")
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=r"out: cannot be written .*; choose another --out"):
        write_masks(brightness, find_photographs(tmp_path / "a.png", tmp_path), out=tmp_path / "out", ids=IDS)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy/a").touch()
    found = find_photographs(tmp_path / "a.png", tmp_path / "busy")
    with pytest.raises(UserError, match=r"busy/a/mask.png: cannot be written"):
        write_masks(brightness, found, out=tmp_path / "busy", ids=IDS)


def test_overlay__is_tinted_with_a_line_between(tmp_path):
    image = Image.fromarray(np.full((4, 6, 3), 100, dtype=np.uint8))
    classes = np.repeat([[0, 0, 0, 1, 1, 1]], 4, axis=0).astype(np.uint8)
    assert np.array_equal(np.argwhere(contours(classes)), [[row, 2] for row in range(4)])
    pixels = np.asarray(overlay(image, classes, ids=IDS))
    assert pixels[0].tolist() == [[150, 50, 50]] * 2 + [[255] * 3] + [[50, 50, 150]] * 3
    large = image.resize((4500, 30))
    write_overlay(tmp_path / "x.jpg", large, np.zeros((30, 4500), dtype=np.uint8), ids=IDS)
    assert Image.open(tmp_path / "x.jpg").size == (2048, 14)


def test_contours__leave_out_specks():
    classes = np.zeros((60, 80), dtype=np.uint8)
    classes[10, 10:12] = 1  # 2 pixels of 4,800
    assert np.array_equal(specks(classes), classes == 1)
    assert not contours(classes).any()
    classes[30:50, 30:50] = 1
    assert contours(classes).sum() == 4 * 20 - 1  # a corner is on two sides
    assert not specks(np.zeros((1, 1), dtype=np.uint8)).any()
