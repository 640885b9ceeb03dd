import os
import struct

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.vision.images import as_rgb, find_images, open_image, open_label

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def test_open__sixteen_bit_takes_the_upper_byte(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 256 + 77).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.repeat(GREY[:, :, None], 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_open__other_modes(tmp_path, mode):
    ending = {"CMYK": "tif", "LA": "png"}.get(mode, "png")
    Image.fromarray(GREY).convert(mode).save(tmp_path / f"image.{ending}")
    image = open_image(tmp_path / f"image.{ending}")
    assert (image.mode, image.size) == ("RGB", (8, 6))
    if mode not in ("1", "CMYK"):
        assert np.array_equal(np.asarray(image)[:, :, 1], GREY)


def test_open__palette_with_a_transparent_colour(tmp_path):
    colours = Image.fromarray(GREY % 3, mode="L").convert("P")
    colours.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "palette.png"))[0, :3].tolist() == [
        [255, 0, 0], [0, 0, 255], [0, 255, 0],
    ]  # fmt: skip


def test_open__exif_orientation_is_applied(tmp_path):
    """Once, and also if another tag is malformed, which Pillow cannot write again."""
    tags = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)  # turned a quarter clockwise to be upright
    tags += struct.pack("<HHL4sL", 0x0128, 2, 2, b"x", 0)  # the unit of the resolution is a text
    exif = b"Exif\0\0" + struct.pack("<2sHLH", b"II", 42, 8, 2) + tags
    Image.fromarray(GREY).save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert np.array_equal(np.asarray(opened)[:, :, 0], np.rot90(GREY, -1))
    assert as_rgb(opened, "turned").size == opened.size
    image = Image.open(tmp_path / "turned.png")
    as_rgb(image, "turned")
    assert image.info["exif"] == exif


@pytest.mark.parametrize("values", [np.full((4, 4), 1e5, np.float32), np.full((4, 4), 70000, np.int32)])
def test_open__other_depths_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match=r"deep\.tif: image mode is [FI], must have 8 or 16 bits"):
        open_image(tmp_path / "deep.tif")


def test_open__only_regular_files_of_known_formats(tmp_path):
    (tmp_path / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name in ("script.jpg", "pipe.jpg", "loop.jpg", "missing.jpg"):
        with pytest.raises(UserError, match=rf"{name}: not a readable image"):
            open_image(tmp_path / name)
    with pytest.raises(UserError, match=r"walk\.mp4: is a video; .*ffmpeg -i"):
        open_image(tmp_path / "walk.mp4")


def test_label__mismatch(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "label.png")
    with pytest.raises(UserError, match=r"label is \(8, 6\).*its image is \(6, 8\); .*EXIF"):
        open_label(tmp_path / "label.png", (6, 8))
    Image.fromarray(GREY).convert("RGB").save(tmp_path / "colours.png")
    with pytest.raises(UserError, match="label mode is RGB"):
        open_label(tmp_path / "colours.png", (8, 6))


def test_find__by_kind_of_file(tmp_path):
    for name in ("b.JPG", "a/c.png", ".hidden.jpg", ".cache/d.png", "film.MP4", "notes.txt", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images, skipped = find_images(tmp_path)
    assert images == [tmp_path / "a/c.png", tmp_path / "b.JPG"]
    assert skipped.startswith("other files: 1 .mp4, 1 .txt, 1 without ending; extract the frames of a video")
    for name in ("masks/index.html", "masks/legend.json", "masks/a/overlay.jpg"):  # of eval.py --images
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).touch()
    assert find_images(tmp_path / "a") == ([tmp_path / "a/c.png"], "other files: 1 folder of masks")
    assert find_images(tmp_path, without=tmp_path / "a")[0] == [tmp_path / "b.JPG"]
