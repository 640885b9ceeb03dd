"""Each data set of the paper on a miniature in its official layout."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dataset.cityscapes import OFFICIAL
from dataset.cocostuff import COARSE_OF_FINE, NAMES
from tests.dataset.files import SIZE, picture, save
from utils.errors import UserError


def assert_classes(data, rule):
    """The classes of the first validation label, which holds every raw value."""
    source = data.validation_set.source
    raw = np.asarray(source.read(0).label)
    assert np.array_equal(source.rule[raw], np.vectorize(rule)(raw))


def coarse27(fine):
    return COARSE_OF_FINE[fine] if fine < 182 else 255


def coarse15(fine):
    return coarse27(fine) - 12 if 12 <= coarse27(fine) < 255 else 255


def coarse3(fine):
    return {"sky": 0, "plant": 1, "ground": 2}.get(NAMES[coarse27(fine)], 255) if fine < 182 else 255


@pytest.mark.parametrize(
    ("data_type", "rule", "n_classes"),
    [("cocostuff27", coarse27, 27), ("cocostuff15", coarse15, 15), ("cocostuff3", coarse3, 3)],
)
def test_cocostuff__every_fine_id(data_of, coco, data_type, rule, n_classes):
    data = data_of(data_type, coco)
    assert data.labels.n_classes == n_classes
    assert len(data.train_set) == len(data.validation_set) == 3
    assert_classes(data, rule)


def test_cocostuff__tables_are_the_reference_ones(shared):
    stored = json.loads((shared / "reference/labels.json").read_text())["cocostuff27"]
    assert list(COARSE_OF_FINE) == stored["fine_to_coarse"]
    assert [name.split(" (")[0] for name in NAMES] == stored["classes"]
    assert len(set(NAMES)) == 27  # doubles told apart


def test_cityscapes__official_ids(data_of, cityscapes):
    data = data_of("cityscapes", cityscapes)
    assert_classes(data, lambda raw: raw - 7 if 7 <= raw <= 33 else 255)
    assert data.labels.names[0] == "road"
    assert data.labels.palette[0] == (128, 64, 128)
    assert data.labels.names[-1] == OFFICIAL[33].name == "bicycle"


@pytest.mark.parametrize("data_type", ["potsdam", "potsdamraw"])
def test_potsdam__six_classes_to_three(data_of, potsdam, data_type):
    data = data_of(data_type, potsdam, dataset__crop_type="five")
    rule = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2}
    assert_classes(data, lambda raw: rule.get(raw, 255))
    assert len(data.train_set) == 2  # whole images
    assert data.validation_set.source.read(0).image.mode == "RGB"


def test_potsdamraw__patches_without_a_label(data_of, potsdam):
    (potsdam / "processed/gt/2_10_0_1.mat").unlink()
    data = data_of("potsdamraw", potsdam)
    assert data.validation_labelled
    assert (data.validation_set[0].label != 255).any()
    assert (data.validation_set[1].label == 255).all()


def test_cocostuff__ignores_the_exif_orientation(data_of, coco):
    """As published: labels have the orientation of the stored pixels."""
    file, exif = coco / "images/train2017/000000000001.jpg", Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(picture(1).astype(np.uint8)).save(file, exif=exif)
    read = data_of("cocostuff27", coco).train_set.source.read_image(1)
    assert np.array_equal(read, Image.open(file))  # Pillow does not turn it


@pytest.mark.parametrize(
    ("data_type", "missing", "fix"),
    [
        ("cocostuff27", r"Coco164kFull_Stuff_Coarse\.txt is missing", "dataset_download.py cocostuff --root"),
        ("cocostuff15", r"Coco164kFull_Stuff_Coarse_7\.txt is missing", "dataset_download.py cocostuff"),
        ("cocostuff3", r"Coco164kFew_Stuff_6\.txt is missing", "dataset_download.py cocostuff --root"),
        ("cityscapes", "leftImg8bit/train/<city>/.* is missing", "dataset_download.py cityscapes --root"),
        ("potsdam", r"labelled_train\.txt is missing", "dataset_download.py potsdam --root"),
        ("potsdamraw", r"processed/imgs/\*\.mat is missing", "dataset_download.py potsdamraw --root"),
        ("directory", "holds no image", "put yours there"),
    ],
)
def test_missing__names_the_file_and_the_command(data_of, tmp_path, data_type, missing, fix):
    root = tmp_path / "my data"
    with pytest.raises(UserError, match=missing) as error:
        data_of(data_type, root, dataset__n_classes=2)
    assert f"dataset.data_path is {root}: " in str(error.value)
    assert fix in str(error.value)
    assert data_type == "directory" or f"--root '{root}'" in str(error.value)


@pytest.mark.parametrize(
    ("data_type", "layout", "files", "named"),
    [
        ("cocostuff27", "coco", "images/train2017/000000000001.jpg", r"train2017/000000000001\.jpg is"),
        ("cocostuff27", "coco", "annotations/val2017/*.png", r"0000000\.png is missing;"),
        ("cityscapes", "cityscapes", "gtFine/val/ulm/*", r"ulm_000000_000019_gtFine_labelIds\.png is"),
        ("cityscapes", "cityscapes", "leftImg8bit/val/*/*", "leftImg8bit/val/<city>"),
        ("potsdam", "potsdam", "gt/2_10_0_1.mat", r"gt/2_10_0_1\.mat is missing;"),
        ("potsdamraw", "potsdam", "processed/gt/*", r"processed/gt/\*\.mat is missing;"),
    ],
)
def test_missing__first_file_of_a_list(data_of, request, data_type, layout, files, named):
    root = request.getfixturevalue(layout)
    for path in root.glob(files):
        path.unlink()
    with pytest.raises(UserError, match=named):
        data_of(data_type, root)


def test_label_values__outside_the_rule_are_named(data_of, cityscapes):
    label = "gtFine/val/aachen/aachen_000001_000019_gtFine_labelIds.png"
    save(cityscapes / label, np.resize([0, 255, 34, 77], (SIZE[1], SIZE[0])))
    message = rf"{label}: the label holds \[34, 77\], must hold only \[0, 1, 2, \.\.\., "
    with pytest.raises(UserError, match=message):
        data_of("cityscapes", cityscapes).validation_set[0]


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("imgs", None, "not a readable .mat file"),
        ("imgs", {"other": np.zeros(3)}, "not a readable .mat file"),
        ("gt", {"gt": np.full((200, 200), 7)}, r"the label holds \[7\], must hold only \[0, 1, 2, 3, 4, 5, "),
    ],
)
def test_potsdam__entries_are_checked(data_of, potsdam, entry, value, message):
    path = potsdam / entry / "2_10_0_0.mat"
    path.write_bytes(b"MATLAB 5.0 nonsense" * 20) if value is None else savemat(path, value)
    with pytest.raises(UserError, match=rf"{entry}/2_10_0_0\.mat: .*{message}"):
        data_of("potsdam", potsdam).validation_set[0]


def test_potsdam__negative_ids_are_ignored(data_of, potsdam):
    savemat(potsdam / "gt/2_10_0_0.mat", {"gt": np.full((200, 200), -1, np.int16)})
    assert (data_of("potsdam", potsdam).validation_set[0].label == 255).all()
