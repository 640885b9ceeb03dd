import pytest

from dataset.crops import crop_boxes
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
