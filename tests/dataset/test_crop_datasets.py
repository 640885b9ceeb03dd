"""Crop boxes, and the crops program: its files, restarts, damaged images and mistakes."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.crop_datasets import main
from dataset.crops import crop_boxes
from tests.dataset import miniatures
from tests.dataset.files import SIZE, names, picture, save
from utils.errors import UserError
from utils.files import exclusive

FOLDER = "cropped/directory_five_crop_0.5"


@pytest.fixture
def crop(tiny_file):
    """Runs the program on a folder of photographs."""

    def run(folder, *further, workers=0, **changed):
        chosen = {"dataset__data_type": "directory", "dataset__crop_type": "five"}
        file = tiny_file(**chosen | changed)
        main(["--opt", file, "--data_path", str(folder), "--workers", str(workers), *further])

    return run


@pytest.fixture
def prepared(crop, directory):
    crop(directory)
    return directory


@pytest.fixture
def with_crops(data_of):
    def build(folder, **changed):
        return data_of("directory", folder, dataset__crop_type="five", **changed)

    return build


def contents(folder):
    """Every file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_boxes():
    assert crop_boxes((9, 7), 0.5, "five", 0) == [
        (0, 0, 4, 3), (5, 0, 9, 3), (0, 4, 4, 7), (5, 4, 9, 7), (2, 2, 6, 5),
    ]  # fmt: skip
    boxes = crop_boxes((90, 70), 0.5, "random", 3)
    assert boxes == crop_boxes((90, 70), 0.5, "random", 3) != crop_boxes((90, 70), 0.5, "random", 4)
    assert len(set(boxes)) == 5
    assert all(
        x >= 0 and y >= 0 and r <= 90 and b <= 70 and (r - x, b - y) == (45, 35) for x, y, r, b in boxes
    )


@pytest.mark.parametrize("kind", ["five", "random"])
def test_files__are_what_training_reads(crop, directory, data_of, kind):
    """Instead of crops that are cut on the fly."""
    live = data_of("directory", directory, dataset__crop_type=kind).train_set
    crop(directory, dataset__crop_type=kind)
    stored = data_of("directory", directory, dataset__crop_type=kind).train_set
    assert len(contents(directory / f"cropped/directory_{kind}_crop_0.5")) == 40
    assert names(stored) == [f"{number}.jpg" for number in range(20)]
    for a, b in zip(live, stored, strict=True):
        assert torch.equal(a.label, b.label)
        assert (a.image.int() - b.image.int()).abs().float().mean() < 25  # a second JPEG pass over noise


def test_files__images_without_labels(crop, directory, with_crops):
    shutil.rmtree(directory / "labels/train")
    crop(directory)
    assert not (directory / FOLDER / "label").exists()
    (directory / FOLDER / "img/train/._0.jpg").touch()  # of macOS
    assert not with_crops(directory).train_labelled

    save(directory / "labels/train/2.png", np.ones((SIZE[1], SIZE[0])))  # one image has a label
    with pytest.raises(UserError, match=r"0 crops, must contain 20 .*with their labels"):
        with_crops(directory)
    crop(directory)
    values = [set(np.unique(Image.open(directory / FOLDER / f"label/train/{n}.png"))) for n in range(20)]
    assert values == 10 * [{0}] + 5 * [{2}] + 5 * [{0}]
    assert with_crops(directory).train_labelled


def test_restart__writes_what_is_missing_and_nothing_else(crop, prepared, capsys):
    folder = prepared / FOLDER
    with exclusive(folder), pytest.raises(UserError, match=r"crop_0\.5 is in use by process"):
        crop(prepared)
    whole = contents(folder)
    shutil.rmtree(folder)
    crop(prepared, workers=2)
    assert contents(folder) == whole
    (folder / "img/train/7.jpg").unlink()
    (folder / "label/train/11.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    crop(prepared, "--dry-run")
    assert "2 of 4 images have all their crops" in capsys.readouterr().out
    assert len(contents(folder)) == 38
    crop(prepared)
    assert contents(folder) == whole
    changed = {p.name for p in folder.rglob("*.jpg") if p.stat().st_mtime_ns != before.get(p.name)}
    assert changed == {f"{number}.jpg" for number in range(5, 15)}


def test_damaged__images_are_named_after_the_others_are_done_or_skipped(crop, directory, with_crops):
    (directory / "imgs/train/1.jpg").write_bytes(b"no picture")
    save(directory / "labels/train/3.png", np.full((SIZE[1], SIZE[0]), 7))
    with pytest.raises(UserError, match=r"2 of 4 images(.|\n)*1\.jpg: not a readable(.|\n)*3\.png"):
        crop(directory, workers=2)
    assert len(contents(directory / FOLDER)) == 20
    crop(directory, "dataset.skip_damaged=true")
    stored = with_crops(directory, dataset__skip_damaged=True)
    assert names(stored.train_set) == [f"{number}.jpg" for number in (*range(5), *range(10, 15))]


def test_training__refuses_crops_of_other_images(prepared, with_crops):
    """So are those without a label."""
    label = prepared / FOLDER / "label/train/7.png"
    label.rename(prepared / "7.png")
    with pytest.raises(UserError, match="19 crops, must contain 20"):
        with_crops(prepared)
    (prepared / "7.png").rename(label)
    save(prepared / "imgs/train/9.jpg", picture(9))
    with pytest.raises(UserError, match="20 crops, must contain 25"):
        with_crops(prepared)


@pytest.mark.parametrize("workers", [0, 1])
def test_full_disk__names_the_file(crop, directory, monkeypatch, workers):
    def full(image, file, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"0\.png: cannot be written \(No space left on device\)"):
        crop(directory, workers=workers)


@pytest.mark.parametrize(
    ("words", "changed", "message"),
    [
        ([], {"dataset__crop_type": None}, "no crops to prepare"),
        ([], {"dataset__data_type": "synthetic"}, "no crops to prepare"),
        ([], {"dataset__data_type": "cocostuff15"}, "no crops to prepare"),
        (["dataset.crop_ratio=0.4,0.5"], {}, "a sweep of 2 runs"),
    ],
)
def test_mistake__nothing_to_prepare(crop, directory, words, changed, message):
    with pytest.raises(UserError, match=message):
        crop(directory, *words, **changed)


def test_cocostuff(crop, tmp_path):
    """Crops are numbered in the order of the list; labels hold class + 1."""
    coco = miniatures.make_cocostuff(tmp_path / "coco", counts=(2, 0))
    save(coco / "annotations/train2017/000000000001.png", np.resize([0, 1, 181, 255], (SIZE[1], SIZE[0])))
    listing = coco / "curated/train2017/Coco164kFull_Stuff_Coarse.txt"
    listing.write_text("000000000001\n000000000000\n")
    crop(coco, dataset__data_type="cocostuff27")
    folder = coco / "cropped/cocostuff27_five_crop_0.5"
    assert set(np.unique(Image.open(folder / "label/train/0.png"))) == {0, 10, 12, 25}
    stream = io.BytesIO()
    Image.open(coco / "images/train2017/000000000001.jpg").crop((0, 0, 30, 22)).save(stream, "JPEG")
    assert (folder / "img/train/0.jpg").read_bytes() == stream.getvalue()
