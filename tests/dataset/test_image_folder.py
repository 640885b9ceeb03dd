"""Folders of photographs: layout, labels, and every kind of image file."""

import json
import shutil

import numpy as np
import pytest

from tests.dataset.files import SIZE, names, picture, save
from utils.errors import UserError


def test_directory__class_count_from_the_options(data_of, directory):
    (directory / "classes.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.n_classes is null"):
        data_of("directory", directory)
    data = data_of("directory", directory, dataset__n_classes=3)
    assert data.labels.names == ("class 0", "class 1", "class 2")
    with pytest.raises(UserError, match="2 class names"):
        data_of("directory", directory, dataset__n_classes=3, dataset__class_names=["x", "y"])


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"n_classes": "3"}, r"classes\.json(.|\n)*n_classes is '3'"),
        ({"n_classes": 3, "ignore": 0}, r"classes\.json(.|\n)*ignore is 0"),
        ({"n_classes": 3, "ignore_index": 0}, r"classes\.json(.|\n)*ignore_index is 0"),
        ({"classes": [str(i) for i in range(256)]}, "256 classes, must be at most 255"),
    ],
)
def test_directory__classes_json_is_checked(data_of, directory, about, message):
    (directory / "classes.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=message):
        data_of("directory", directory)


def test_directory__plain_folder_is_trained_on(data_of, tmp_path):
    save(tmp_path / "2019/summer/a.jpg", picture(0))
    save(tmp_path / "b.png", picture(1))
    save(tmp_path / ".thumbnails/b.png", picture(1))
    save(tmp_path / "cropped/directory_five_crop_0.5/img/train/0.jpg", picture(0))
    data = data_of("directory", tmp_path, dataset__n_classes=4)
    assert names(data.train_set) == ["a.jpg", "b.png"]
    assert not data.train_labelled
    assert not data.validation_labelled
    assert (data.train_set[0].label == 255).all()


def test_directory__train_images_without_labels_take_the_place_of_validation_images(data_of, directory):
    shutil.rmtree(directory / "imgs/val")
    data = data_of("directory", directory, eval__pictures=3)
    assert data.train_labelled
    assert not data.validation_labelled
    assert names(data.validation_set) == names(data.train_set)[:3]
    assert all((item.label == 255).all() for item in data.validation_set)
    assert len(data_of("directory", directory, eval__pictures=0).validation_set) == 0


def test_directory__nested_folders_links_and_a_subset_of_labels(data_of, directory, tmp_path_factory):
    """Labels are found like images, also with endings in capitals; a circle of links ends."""
    save(directory / "imgs/val/rome/day.1/0.jpg", picture(3))
    save(directory / "imgs/val/rome/1.jpg", picture(4))
    save(directory / "labels/val/rome/day.1/0.png", np.ones((SIZE[1], SIZE[0])))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "imgs/a.jpg", picture(0))
    save(elsewhere / "labels/a.PNG", np.ones((SIZE[1], SIZE[0])))
    for part in ("imgs", "labels"):
        (directory / f"{part}/val/city").symlink_to(elsewhere / part)
    (elsewhere / "imgs/back").symlink_to(directory / "imgs/val")
    data = data_of("directory", directory)
    assert data.labels.names == ("a", "b", "c")
    assert set(data.validation_set[0].label.unique().tolist()) == {0, 1, 2, 255}
    images = [data.validation_set.name(index).removeprefix(f"{directory}/imgs/val/") for index in range(5)]
    assert images == ["0.jpg", "1.jpg", "city/a.jpg", "rome/1.jpg", "rome/day.1/0.jpg"]
    assert (data.validation_set[2].label == 1).all()
    assert (data.validation_set[3].label == 255).all()
    assert (data.validation_set[4].label == 1).all()


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


def test_directory__labels_that_are_not_used_are_reported(data_of, tmp_path, directory, capsys):
    save(tmp_path / "plain/rome/a.jpg", picture(0))
    save(tmp_path / "plain/rome/masks/a.png", np.ones((SIZE[1], SIZE[0])))
    data_of("directory", tmp_path / "plain", dataset__n_classes=3)
    assert "plain: the images in masks are used as training photographs" in capsys.readouterr().out
    for path in (directory / "labels/train").iterdir():
        path.rename(path.with_suffix(".txt"))
    (directory / "labels/val").rename(directory / "labels/validation")
    assert not data_of("directory", directory).train_labelled
    said = capsys.readouterr().out
    assert f"{directory}/labels/train: holds no PNG file" in said
    assert f"{directory}/labels/val: holds no PNG file" in said


def test_directory__videos_are_refused_with_a_hint(data_of, directory, capsys):
    for path in (directory / "imgs/train").iterdir():
        path.unlink()
    (directory / "imgs/train/walk.MOV").touch()
    with pytest.raises(UserError, match="holds no image"):
        data_of("directory", directory)
    assert "1 .mov; extract the frames of a video" in capsys.readouterr().out
