"""Each data set on a miniature in its published layout, real files made here."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from dataset import DATA_SETS
from dataset.cityscapes import OFFICIAL
from dataset.cocostuff import COARSE_OF_FINE, NAMES
from tests.dataset.files import SIZE, picture, save
from utils.errors import UserError


@pytest.fixture
def coco(tmp_path):
    """Three images a split; the first label holds every fine id and 255 in its columns."""
    for split, lists in (
        (
            "train2017",
            ["Coco164kFull_Stuff_Coarse.txt", "Coco164kFull_Stuff_Coarse_7.txt", "Coco164kFew_Stuff_6.txt"],
        ),
        ("val2017", ["Coco164kFull_Stuff_Coarse_7.txt", "Coco164kFew_Stuff_6.txt"]),
    ):
        ids = [f"{number:012d}" for number in range(3)]
        for number, name in enumerate(ids):
            label = np.resize(np.r_[np.arange(182), 255], (SIZE[1], SIZE[0]))
            save(tmp_path / "images" / split / f"{name}.jpg", picture(number))
            save(tmp_path / "annotations" / split / f"{name}.png", label)
        (tmp_path / "curated" / split).mkdir(parents=True)
        for listing in lists:
            (tmp_path / "curated" / split / listing).write_text("\n".join(ids) + "\n")
    return tmp_path


@pytest.fixture
def cityscapes(tmp_path):
    for split in ("train", "val"):
        for number, city in enumerate(("ulm", "aachen")):
            name = f"{city}_00000{number}_000019"
            save(tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", picture(number))
            label = np.resize(np.r_[np.arange(34), 255], (SIZE[1], SIZE[0]))
            save(tmp_path / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", label)
    return tmp_path


@pytest.fixture
def potsdam(tmp_path):
    rng = np.random.default_rng(0)
    for root in (tmp_path, tmp_path / "processed"):
        (root / "imgs").mkdir(parents=True)
        (root / "gt").mkdir()
        for name in ("2_10_0_0", "2_10_0_1"):
            savemat(
                root / "imgs" / f"{name}.mat", {"img": rng.integers(0, 256, (200, 200, 4), dtype=np.uint8)}
            )
            gt = np.resize(np.r_[np.arange(6), 255], (200, 200)).astype(np.uint8)
            savemat(root / "gt" / f"{name}.mat", {"gt": gt})
    for listing in ("labelled_train.txt", "labelled_test.txt"):
        (tmp_path / listing).write_text("2_10_0_0\n2_10_0_1\n")
    return tmp_path


def expected_classes(source, rule):
    raw = np.asarray(source.read(0).label)
    return np.vectorize(rule)(raw), source.rule[raw]


def coarse27(fine):
    return COARSE_OF_FINE[fine] if fine < 182 else -1


def coarse15(fine):
    return coarse27(fine) - 12 if coarse27(fine) >= 12 else -1


def coarse3(fine):
    return {"sky": 0, "plant": 1, "ground": 2}.get(NAMES[coarse27(fine)], -1) if fine < 182 else -1


@pytest.mark.parametrize(
    ("data_type", "rule", "n_classes"),
    [("cocostuff27", coarse27, 27), ("cocostuff15", coarse15, 15), ("cocostuff3", coarse3, 3)],
)
def test_cocostuff__every_fine_id(data_of, coco, data_type, rule, n_classes):
    data = data_of(data_type, coco)
    assert data.labels.n_classes == n_classes
    assert len(data.train_set) == len(data.validation_set) == 3
    expected, got = expected_classes(data.validation_set.source, rule)
    assert np.array_equal(expected, got)


def test_cocostuff__tables_are_the_reference_ones(shared):
    stored = json.loads((shared / "reference/labels.json").read_text())["cocostuff27"]
    assert list(COARSE_OF_FINE) == stored["fine_to_coarse"]
    assert [name.split(" (")[0] for name in NAMES] == stored["classes"]
    assert len(set(NAMES)) == 27  # doubles told apart


def test_cityscapes__official_ids(data_of, cityscapes):
    data = data_of("cityscapes", cityscapes)
    expected, got = expected_classes(
        data.validation_set.source, lambda raw: raw - 7 if 7 <= raw <= 33 else -1
    )
    assert np.array_equal(expected, got)
    assert data.labels.names[0] == "road"
    assert data.labels.palette[0] == (128, 64, 128)
    assert data.labels.names[-1] == OFFICIAL[33].name == "bicycle"


@pytest.mark.parametrize("data_type", ["potsdam", "potsdamraw"])
def test_potsdam__six_classes_to_three(data_of, potsdam, data_type, capsys):
    data = data_of(data_type, potsdam, dataset__crop_type="five")
    rule = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2}
    expected, got = expected_classes(data.validation_set.source, lambda raw: rule.get(raw, -1))
    assert np.array_equal(expected, got)
    assert len(data.train_set) == 2  # whole images
    assert "ignored" in capsys.readouterr().out
    assert data.validation_set.source.read(0).image.mode == "RGB"


def test_directory__items(data_of, directory):
    data = data_of("directory", directory)
    item = data.validation_set[1]
    assert item.image.shape == (3, 32, 32)
    assert item.image.dtype == torch.uint8
    assert set(item.label.unique().tolist()) == {-1, 0, 1, 2}
    assert data.labels.names == ("a", "b", "c")


def test_directory__labels_and_validation_are_optional(data_of, directory):
    shutil.rmtree(directory / "labels")
    shutil.rmtree(directory / "imgs/val")
    data = data_of("directory", directory)
    assert not data.train_labelled
    assert not data.validation_labelled
    assert len(data.validation_set) == 0
    assert (data.train_set[0].label == -1).all()


def test_directory__class_count_from_the_options(data_of, directory):
    (directory / "classes.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.n_classes is null"):
        data_of("directory", directory)
    assert data_of("directory", directory, dataset__n_classes=3).labels.names == (
        "class 0",
        "class 1",
        "class 2",
    )
    with pytest.raises(UserError, match="2 class names"):
        data_of("directory", directory, dataset__n_classes=3, dataset__class_names=["x", "y"])


@pytest.mark.parametrize(
    ("about", "word"),
    [
        ({"n_classes": "3"}, "n_classes is '3'"),
        ({"n_classes": 300}, "n_classes is 300"),
        ({"n_classes": True}, "n_classes is True"),
        ({"classes": [1, 1]}, "classes is"),
        ({"n_classes": 3, "ignore": -1}, "ignore is -1"),
        ({"n_classes": 3, "ignore": 0}, "ignore is 0"),
        ({"n_classes": 3, "ignore": "x"}, "ignore is 'x'"),
        ([], "must hold an object"),
    ],
)
def test_directory__classes_json_is_checked(data_of, directory, about, word):
    (directory / "classes.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"classes\.json") as error:
        data_of("directory", directory)
    assert word in str(error.value)


def test_directory__sixteen_bit_photograph_is_refused(data_of, directory):
    (directory / "imgs/val/0.jpg").unlink()
    Image.fromarray(np.full((8, 8), 900, dtype=np.uint16)).save(directory / "imgs/val/0.png")
    with pytest.raises(UserError, match=r"0\.png: image mode is I"):
        data_of("directory", directory).validation_set[0]


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 nonsense" * 20])
def test_potsdam__damaged_mat_is_named(data_of, potsdam, content):
    (potsdam / "imgs/2_10_0_0.mat").write_bytes(content)
    with pytest.raises(UserError, match=r"2_10_0_0\.mat: not a readable"):
        data_of("potsdam", potsdam).validation_set[0]


def test_directory__label_value_outside_the_rule_is_named(data_of, directory):
    save(directory / "labels/val/0.png", np.full((SIZE[1], SIZE[0]), 9))
    with pytest.raises(UserError, match=r"0\.jpg: its label holds 9, must be one of \[0, 1, 2, 255\]"):
        data_of("directory", directory).validation_set[0]


def test_directory__damaged_and_mismatched_files_are_named(data_of, directory):
    (directory / "imgs/val/0.jpg").write_bytes(b"no image")
    save(directory / "labels/val/1.png", np.zeros((5, 5)))
    data = data_of("directory", directory)
    with pytest.raises(UserError, match=r"0\.jpg: not a readable image"):
        data.validation_set[0]
    with pytest.raises(UserError, match=r"1\.png: label is \(5, 5\)"):
        data.validation_set[1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_directory__other_image_modes(data_of, directory, mode):
    image = Image.fromarray(picture(0).astype(np.uint8)).convert(mode)
    (directory / "imgs/val/0.jpg").unlink()
    image.save(directory / "imgs/val" / ("0.tif" if mode == "CMYK" else "0.png"))
    assert data_of("directory", directory).validation_set[0].image.shape == (3, 32, 32)


@pytest.mark.parametrize("data_type", [name for name in DATA_SETS if name != "synthetic"])
def test_missing__names_the_folder_and_what_it_should_hold(data_of, tmp_path, data_type):
    with pytest.raises(UserError) as error:
        data_of(data_type, tmp_path, dataset__n_classes=2)
    assert str(tmp_path) in str(error.value)
