import numpy as np
import pytest
import torch
from PIL import Image

from dataset.crops import crop_boxes
from tests.dataset.files import save
from utils.errors import UserError


def test_crops__empty_prepared_folder_is_named(data_of, directory):
    (directory / "cropped/directory_five_crop_0.5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"contains 0 crops, must contain 20"):
        data_of("directory", directory, dataset__crop_type="five")


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
