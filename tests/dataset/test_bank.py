import numpy as np
import pytest
import torch
from PIL import Image

from dataset import build_data
from dataset.bank import bank_images
from utils.errors import UserError


@pytest.fixture
def photographs(tmp_path, tiny_options):
    def make(train, val):
        """A directory data set of photographs of 50 x 40 pixels without labels."""
        for split, count in (("train", train), ("val", val)):
            folder = tmp_path / "photos/imgs" / split
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([number, count]).integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
        options = tiny_options(
            dataset__data_type="directory",
            dataset__n_classes=3,
            dataset__data_path=str(tmp_path / "photos"),
            dataset__crop_type="five",
        )
        return build_data(options, train=False)

    return make


def test_bank_images__the_asked_one_and_others_spread(photographs):
    data = photographs(train=0, val=9)
    bank = bank_images(data, "4", size=5)
    assert [name.rsplit("/", 1)[1] for name in bank.names] == ["4.png", "0.png", "2.png", "5.png", "7.png"]
    assert bank.images.shape == (5, 3, 32, 32)
    assert bank.images.dtype == torch.uint8
    assert torch.equal(bank.images[0], data.validation_set[4].image)
    assert torch.equal(bank.images[3], data.validation_set[5].image)
    assert bank.about == "bank: 5 images, this one and 4 of the validation split"
    assert len(bank_images(data, "4", size=64).images) == 9
    assert bank_images(data, "4", size=1).about == "bank: this image alone"


def test_bank_images__a_path_takes_the_geometry_of_validation(photographs, tmp_path):
    data = photographs(train=0, val=3)
    same = bank_images(data, str(tmp_path / "photos/imgs/val/1.png"), size=8)
    assert torch.equal(same.images, bank_images(data, "1", size=8).images)  # not twice in its own bank
    wide = np.zeros((40, 160, 3), dtype=np.uint8)
    wide[:, 60:100] = 255  # all that a centre crop keeps
    Image.fromarray(wide).save(tmp_path / "wide.png")
    bank = bank_images(data, str(tmp_path / "wide.png"), size=8)
    assert bank.images.shape == (4, 3, 32, 32)
    assert bank.images[0].min() == 255
    assert bank.names[0] == str(tmp_path / "wide.png")


def test_bank_images__without_validation_images(photographs, tmp_path):
    data = photographs(train=3, val=0)
    path = str(tmp_path / "photos/imgs/train/0.png")
    bank = bank_images(data, path, size=8)
    assert bank.about == "bank: 3 images, this one and 2 of the train split"
    assert bank.images.shape == (3, 3, 32, 32)
    with pytest.raises(UserError, match="--explain is 0, but there are no validation images"):
        bank_images(data, "0", size=8)


def test_bank_images__alone(photographs, tmp_path):
    data = photographs(train=0, val=0)
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    bank = bank_images(data, str(tmp_path / "one.png"), size=8)
    assert bank.about == "bank: this image alone"


@pytest.mark.parametrize("image", ["3", "-1"])
def test_bank_images__index_out_of_range(photographs, image):
    with pytest.raises(UserError, match=f"--explain is {image}, must be 0 to 2; give another index"):
        bank_images(photographs(train=0, val=3), image, size=8)


def test_bank_images__missing_or_damaged(photographs, tmp_path):
    data = photographs(train=0, val=1)
    (tmp_path / "damaged.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"damaged\.jpg: not a readable image"):
        bank_images(data, str(tmp_path / "damaged.jpg"), size=8)
    for name in ("missing.jpg", "photos"):
        with pytest.raises(UserError, match=f"--explain is .*{name}: no such file; name an image file"):
            bank_images(data, str(tmp_path / name), size=8)
