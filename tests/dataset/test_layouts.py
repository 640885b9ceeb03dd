"""Each data set on a miniature in its published layout, real files made here."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from dataset import DATA_SETS, build_data
from dataset.cityscapes import OFFICIAL
from dataset.cocostuff import COARSE_OF_FINE, NAMES
from dataset.crops import crop_boxes
from utils.errors import UserError

SIZE = (60, 44)  # width, height


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3))


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


@pytest.fixture
def directory(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            save(tmp_path / "imgs" / split / f"{number}.jpg", picture(number))
            label = np.resize([0, 1, 2, 255], (SIZE[1], SIZE[0]))
            save(tmp_path / "labels" / split / f"{number}.png", label)
    about = {"n_classes": 3, "classes": ["a", "b", "c"], "ignore": 255}
    (tmp_path / "classes.json").write_text(json.dumps(about))
    return tmp_path


@pytest.fixture
def data_of(tiny_options):
    def build(data_type, folder, **overrides):
        chosen = {
            "dataloader__batch_size": 1,
            "dataset__data_type": data_type,
            "dataset__data_path": str(folder),
        }
        return build_data(tiny_options(**chosen | overrides))

    return build


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
    import shutil

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


def test_crops__empty_prepared_folder_is_named(data_of, directory):
    (directory / "cropped/directory_five_crop_0.5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no <number>\.jpg"):
        data_of("directory", directory, dataset__crop_type="five")


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


def test_batch__larger_than_the_train_split(data_of, directory):
    with pytest.raises(UserError, match=r"batch_size is 5, but there are only 4 train items"):
        data_of("directory", directory, dataloader__batch_size=5)


def test_crops__boxes():
    assert crop_boxes((9, 7), 0.5, "five", 0) == [
        (0, 0, 4, 3), (5, 0, 9, 3), (0, 4, 4, 7), (5, 4, 9, 7), (2, 2, 6, 5),
    ]  # fmt: skip
    boxes = crop_boxes((90, 70), 0.5, "random", 3)
    assert boxes == crop_boxes((90, 70), 0.5, "random", 3) != crop_boxes((90, 70), 0.5, "random", 4)
    assert len(set(boxes)) == 5
    assert all(
        x >= 0 and y >= 0 and r <= 90 and b <= 70 and (r - x, b - y) == (45, 35) for x, y, r, b in boxes
    )


def test_crops__on_the_fly_equal_prepared_ones(data_of, directory):
    """The published folder, written here from the boxes, against crops cut on the fly."""
    live = data_of("directory", directory, dataset__crop_type="five")
    assert len(live.train_set) == 20
    for index in range(4):
        image = Image.open(directory / f"imgs/train/{index}.jpg")
        label = np.asarray(Image.open(directory / f"labels/train/{index}.png"))
        for k, (left, top, right, bottom) in enumerate(crop_boxes(image.size, 0.5, "five", index)):
            cut = np.asarray(image)[top:bottom, left:right]
            save(directory / f"cropped/directory_five_crop_0.5/img/train/{5 * index + k}.jpg", cut)
            stored = np.where(label == 255, 0, label.astype(int) + 1)[top:bottom, left:right]
            save(directory / f"cropped/directory_five_crop_0.5/label/train/{5 * index + k}.png", stored)
    prepared = data_of("directory", directory, dataset__crop_type="five")
    assert len(prepared.train_set) == 20
    for index in range(20):
        a, b = live.train_set[index], prepared.train_set[index]
        assert torch.equal(a.label, b.label)
        assert (a.image.int() - b.image.int()).abs().float().mean() < 25  # a second JPEG pass over noise


def test_order__is_a_function_of_seed_and_epoch(data_of, directory):
    data = data_of("directory", directory)
    sampler = data.train_dataloader().sampler
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
    assert orders[0] == orders[2]
    assert sorted(orders[0]) == [0, 1, 2, 3]
    assert data_of("directory", directory, train__seed=4).train_dataloader().sampler.seed == 4
