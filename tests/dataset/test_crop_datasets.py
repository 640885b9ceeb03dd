"""The crops program: its files, restarts, damaged images and mistakes."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.crop_datasets import main
from dataset.crops import crop_boxes
from tests.dataset import miniatures
from tests.dataset.files import SIZE, picture, save
from utils.errors import UserError

FOLDER = "cropped/directory_five_crop_0.5"


@pytest.fixture
def words(tiny_file):
    """The program's arguments for a folder of photographs."""

    def build(folder, *further, workers=0, **changed):
        chosen = {"dataset__data_type": "directory", "dataset__crop_type": "five"}
        file = tiny_file(**chosen | changed)
        return ["--opt", file, "--data_path", str(folder), "--workers", str(workers), *further]

    return build


@pytest.fixture
def prepared(words, directory):
    main(words(directory))
    return directory


def contents(folder):
    """Every file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def as_jpeg(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG")
    return np.asarray(Image.open(stream))


@pytest.mark.parametrize("kind", ["five", "random"])
def test_files__hold_the_boxes(words, directory, kind):
    main(words(directory, dataset__crop_type=kind))
    folder = directory / f"cropped/directory_{kind}_crop_0.5"
    assert len(contents(folder)) == 40
    for index in range(4):
        image = Image.open(directory / f"imgs/train/{index}.jpg")
        label = np.asarray(Image.open(directory / f"labels/train/{index}.png")).astype(int)
        expected = np.where(label == 255, 0, label + 1)
        for k, box in enumerate(crop_boxes(image.size, 0.5, kind, index)):
            left, top, right, bottom = box
            stored = Image.open(folder / f"label/train/{5 * index + k}.png")
            assert stored.mode == "L"
            assert np.array_equal(np.asarray(stored), expected[top:bottom, left:right])
            crop = np.asarray(Image.open(folder / f"img/train/{5 * index + k}.jpg"))
            assert np.array_equal(crop, as_jpeg(image.crop(box)))


def test_files__are_what_training_reads(words, directory, data_of):
    live = data_of("directory", directory, dataset__crop_type="five")
    main(words(directory))
    stored = data_of("directory", directory, dataset__crop_type="five")
    assert stored.train_set.crops is None
    for index in range(20):
        a, b = live.train_set[index], stored.train_set[index]
        assert torch.equal(a.label, b.label)
        assert (a.image.int() - b.image.int()).abs().float().mean() < 25  # a second JPEG pass over noise


def test_files__images_without_labels(words, directory, data_of):
    shutil.rmtree(directory / "labels/train")
    main(words(directory))
    assert not (directory / FOLDER / "label").exists()
    assert not data_of("directory", directory, dataset__crop_type="five").train_labelled

    save(directory / "labels/train/2.png", np.ones((SIZE[1], SIZE[0])))  # one image has a label
    main(words(directory))
    values = [set(np.unique(Image.open(directory / FOLDER / f"label/train/{n}.png"))) for n in range(20)]
    assert values == 10 * [{0}] + 5 * [{2}] + 5 * [{0}]
    assert data_of("directory", directory, dataset__crop_type="five").train_labelled


def test_restart__writes_what_is_missing_and_nothing_else(words, prepared, capsys):
    folder = prepared / FOLDER
    whole = contents(folder)
    shutil.rmtree(folder)
    main(words(prepared, workers=2))
    assert contents(folder) == whole
    (folder / "img/train/7.jpg").unlink()
    (folder / "label/train/11.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    main(words(prepared))
    assert "2 of 4 images have all their crops" in capsys.readouterr().out
    assert contents(folder) == whole
    changed = {p.name for p in folder.rglob("*.jpg") if p.stat().st_mtime_ns != before.get(p.name)}
    assert changed == {f"{number}.jpg" for number in range(5, 15)}


def test_damaged__images_are_named_after_the_others_are_done(words, directory):
    image = directory / "imgs/train/1.jpg"
    image.write_bytes(image.read_bytes()[:300])
    save(directory / "labels/train/3.png", np.full((SIZE[1], SIZE[0]), 7))
    with pytest.raises(UserError, match=r"2 of 4 images(.|\n)*1\.jpg: not a readable(.|\n)*3\.png") as error:
        main(words(directory, workers=2))
    assert "dataset.skip_damaged=true" in str(error.value)
    assert len(contents(directory / FOLDER)) == 20


def test_damaged__images_are_skipped(words, directory, data_of, capsys):
    (directory / "imgs/train/1.jpg").write_bytes(b"no picture")
    main(words(directory, "dataset.skip_damaged=true"))
    assert "1 of 4 images are damaged" in capsys.readouterr().out
    stored = data_of("directory", directory, dataset__crop_type="five", dataset__skip_damaged=True)
    expected = [str(number) for number in (*range(5), *range(10, 20))]
    assert [path.stem for path in stored.train_set.source.images] == expected


def test_training__crops_of_other_images_are_refused(prepared, data_of):
    """So are those without a label. Without the whole images, the crops are used as they are."""
    label = prepared / FOLDER / "label/train/7.png"
    label.rename(prepared / "7.png")
    with pytest.raises(UserError, match="19 crops, must contain 20"):
        data_of("directory", prepared, dataset__crop_type="five")
    (prepared / "7.png").rename(label)
    save(prepared / "imgs/train/9.jpg", picture(9))
    with pytest.raises(UserError, match="20 crops, must contain 25"):
        data_of("directory", prepared, dataset__crop_type="five")
    for path in (prepared / "imgs/train").iterdir():
        path.unlink()
    assert len(data_of("directory", prepared, dataset__crop_type="five").train_set) == 20


def test_training__crops_that_lack_labels_and_files_of_other_programs(words, directory, data_of):
    (directory / "labels").rename(directory / "later")
    main(words(directory))
    (directory / FOLDER / "img/train/._0.jpg").touch()  # of macOS
    assert not data_of("directory", directory, dataset__crop_type="five").train_labelled
    (directory / "later").rename(directory / "labels")
    with pytest.raises(UserError, match="its crops have no labels, but the images do"):
        data_of("directory", directory, dataset__crop_type="five")


@pytest.mark.parametrize("workers", [0, 1])
def test_full_disk__names_the_file(words, directory, monkeypatch, workers):
    def full(image, file, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"0\.png: cannot be written \(No space left on device\)"):
        main(words(directory, workers=workers))


def test_dry_run__writes_nothing(words, directory, capsys):
    before = contents(directory)
    main([*words(directory, "--dry-run")])
    assert f"{directory / FOLDER}: 0 of 4 images have all their crops" in capsys.readouterr().out
    assert not (directory / "cropped").exists()
    assert contents(directory).keys() - before.keys() <= {"tiny.json"}


@pytest.mark.parametrize(
    "changed", [{"crop_type": None}, {"data_type": "synthetic"}, {"data_type": "cocostuff15"}]
)
def test_mistake__nothing_to_prepare(words, directory, changed):
    with pytest.raises(UserError, match="no crops to prepare"):
        main(words(directory, **{f"dataset__{key}": value for key, value in changed.items()}))


def test_mistake__in_the_arguments(words, tmp_path):
    with pytest.raises(UserError, match=r"a sweep of 2 runs"):
        main(words(tmp_path, "dataset.crop_ratio=0.4,0.5"))
    with pytest.raises(UserError, match="no such file"):
        main(["--opt", "cocostuf.json"])


def test_cocostuff_and_cityscapes(words, tmp_path):
    coco = miniatures.make_cocostuff(tmp_path / "coco", counts=(2, 0))
    save(coco / "annotations/train2017/000000000001.png", np.resize([0, 1, 181, 255], (SIZE[1], SIZE[0])))
    listing = coco / "curated/train2017/Coco164kFull_Stuff_Coarse.txt"
    listing.write_text("000000000001\n000000000000\n")
    main(words(coco, dataset__data_type="cocostuff27"))
    folder = coco / "cropped/cocostuff27_five_crop_0.5"
    assert set(np.unique(Image.open(folder / "label/train/0.png"))) == {0, 10, 12, 25}
    first = np.asarray(Image.open(folder / "img/train/0.jpg"))  # in the list's order, not by name
    image = Image.open(coco / "images/train2017/000000000001.jpg")
    assert np.array_equal(first, as_jpeg(image.crop((0, 0, 30, 22))))

    cities = miniatures.make_cityscapes(tmp_path / "cities", counts=(1, 0))
    main(words(cities, dataset__data_type="cityscapes"))
    folder = cities / "cropped/cityscapes_five_crop_0.5"
    assert set(np.unique(Image.open(folder / "label/train/4.png"))) == set(range(28))
