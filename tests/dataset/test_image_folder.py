"""Folders of photographs: layout, labels, and every kind of image file."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.dataset.files import SIZE, picture, save
from utils.errors import UserError


def test_directory__items(data_of, directory):
    data = data_of("directory", directory)
    item = data.validation_set[1]
    assert item.image.shape == (3, 32, 32)
    assert item.image.dtype == torch.uint8
    assert set(item.label.unique().tolist()) == {0, 1, 2, 255}
    assert data.labels.names == ("a", "b", "c")


def test_directory__labels_and_validation_are_optional(data_of, directory):
    shutil.rmtree(directory / "labels")
    shutil.rmtree(directory / "imgs/val")
    data = data_of("directory", directory)
    assert not data.train_labelled
    assert not data.validation_labelled
    assert len(data.validation_set) == 0
    assert (data.train_set[0].label == 255).all()


def test_directory__class_count_from_the_options(data_of, directory):
    (directory / "classes.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.n_classes is null"):
        data_of("directory", directory)
    data = data_of("directory", directory, dataset__n_classes=3)
    assert data.labels.names == ("class 0", "class 1", "class 2")
    with pytest.raises(UserError, match="2 class names"):
        data_of("directory", directory, dataset__n_classes=3, dataset__class_names=["x", "y"])


@pytest.mark.parametrize(
    ("about", "word"),
    [
        ({"n_classes": "3"}, "n_classes is '3'"),
        ({"classes": [1, 1]}, "classes.0 is 1"),
        ({"n_classes": 3, "ignore": -1}, "ignore is -1"),
        ({"n_classes": 3, "ignore": 0}, "ignore is 0"),
        ({"n_classes": 3, "ignore_index": 0}, "ignore_index is 0"),
    ],
)
def test_directory__classes_json_is_checked(data_of, directory, about, word):
    (directory / "classes.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"classes\.json") as error:
        data_of("directory", directory)
    assert word in str(error.value)


def test_directory__more_than_255_classes(data_of, directory):
    (directory / "classes.json").write_text(json.dumps({"classes": [str(i) for i in range(256)]}))
    with pytest.raises(UserError, match="256 classes, must be at most 255"):
        data_of("directory", directory)


def test_directory__plain_folder_is_trained_on(data_of, tmp_path):
    save(tmp_path / "2019/summer/a.jpg", picture(0))
    save(tmp_path / "b.png", picture(1))
    save(tmp_path / ".thumbnails/b.png", picture(1))
    save(tmp_path / "cropped/directory_five_crop_0.5/img/train/0.jpg", picture(0))
    data = data_of("directory", tmp_path, dataset__n_classes=4)
    assert [path.name for path in data.train_set.source.images] == ["a.jpg", "b.png"]
    assert not data.train_labelled
    assert not data.validation_labelled


def test_directory__train_images_without_labels_take_the_place_of_validation_images(data_of, directory):
    shutil.rmtree(directory / "imgs/val")
    data = data_of("directory", directory, eval__pictures=3)
    assert data.train_labelled
    assert not data.validation_labelled
    assert [data.validation_set.name(k) for k in range(3)] == [data.train_set.name(k) for k in (0, 1, 2)]
    assert all((item.label == 255).all() for item in data.validation_set)
    assert len(data_of("directory", directory, eval__pictures=0).validation_set) == 0


def test_directory__nested_folders_and_a_subset_of_labels(data_of, directory):
    save(directory / "imgs/val/rome/day.1/0.jpg", picture(3))
    save(directory / "imgs/val/rome/1.jpg", picture(4))
    save(directory / "labels/val/rome/day.1/0.png", np.ones((SIZE[1], SIZE[0])))
    data = data_of("directory", directory)
    names = [str(path.relative_to(directory)) for path in data.validation_set.source.images]
    assert names == [f"imgs/val/{name}.jpg" for name in ("0", "1", "rome/1", "rome/day.1/0")]
    assert (data.validation_set[2].label == 255).all()
    assert (data.validation_set[3].label == 1).all()


def test_directory__links_to_folders_are_followed_and_circles_end(data_of, directory, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "far.jpg", picture(0))
    (directory / "imgs/train/link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(directory / "imgs/train")
    names = [path.name for path in data_of("directory", directory).train_set.source.images]
    assert names.count("far.jpg") == 1


def test_directory__labels_are_found_like_images(data_of, directory, tmp_path_factory, capsys):
    """Through links and with endings in capitals; a folder without PNG files is reported."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for part, name in (("imgs", "a.jpg"), ("labels", "a.PNG")):
        save(elsewhere / part / name, picture(0) if part == "imgs" else np.ones((SIZE[1], SIZE[0])))
        (directory / f"{part}/val/city").symlink_to(elsewhere / part)
    assert (data_of("directory", directory).validation_set[2].label == 1).all()
    for path in (directory / "labels/train").iterdir():
        path.rename(path.with_suffix(".txt"))
    data_of("directory", directory)
    assert f"{directory}/labels/train: contains no PNG file" in capsys.readouterr().out


def test_directory__labels_where_none_are_expected_are_reported(data_of, tmp_path, directory, capsys):
    save(tmp_path / "plain/images/a.jpg", picture(0))
    save(tmp_path / "plain/masks/a.png", np.ones((SIZE[1], SIZE[0])))
    data_of("directory", tmp_path / "plain", dataset__n_classes=3)
    assert f"{tmp_path}/plain/masks: its images are trained on" in capsys.readouterr().out
    (directory / "labels/val").rename(directory / "labels/validation")
    assert not data_of("directory", directory).validation_labelled
    assert f"{directory}/labels/val: no such folder" in capsys.readouterr().out


def test_inventory__does_not_depend_on_how_the_folder_is_written(data_of, directory):
    source = data_of("directory", directory).validation_set.source
    assert source.inventory(f"{directory}/") == source.inventory(str(directory))


def test_directory__labels_that_fit_no_image(data_of, directory, capsys):
    save(directory / "labels/val/2_label.png", np.zeros((SIZE[1], SIZE[0])))
    assert len(data_of("directory", directory).validation_set) == 2
    assert "1 of 3 labels match no image" in capsys.readouterr().out
    for number in range(2):
        (directory / f"labels/val/{number}.png").unlink()
    with pytest.raises(UserError, match=r"e\.g\. .*labels/val/0\.png$"):
        data_of("directory", directory)


def test_directory__videos_are_refused_with_a_hint(data_of, tmp_path, directory, capsys):
    (directory / "imgs/train/walk.mp4").touch()
    (directory / "imgs/train/a.heic").touch()
    assert len(data_of("directory", directory).train_set) == 4
    told = capsys.readouterr().out
    assert "1 .heic" in told
    assert "ffmpeg -i walk.mp4" in told
    alone = tmp_path / "alone"
    (alone / "imgs/train").mkdir(parents=True)
    (alone / "imgs/train/walk.MOV").touch()
    with pytest.raises(UserError, match=r"holds no image .*ffmpeg -i walk\.MOV"):
        data_of("directory", alone, dataset__n_classes=3)
