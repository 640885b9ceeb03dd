import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as vision

from utils.vision.transforms import MEAN, STD, Geometry, center_box, normalise, resized, to_eight_bit


def scene(width, height):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return image, Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (50, 50), (33, 97)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_geometry__equals_torchvision_on_pillow_images(size, interpolation):
    image, label = scene(*size)
    mode = getattr(vision.InterpolationMode, interpolation.upper())
    expected = vision.center_crop(vision.resize(image, 32, mode), [32, 32])
    expected_label = vision.center_crop(vision.resize(label, 32, vision.InterpolationMode.NEAREST), [32, 32])
    got, got_label = Geometry(32, "center", interpolation)(image, label)
    assert np.array_equal(got, expected)
    assert np.array_equal(got_label, expected_label)


def test_geometry__squash_keeps_the_whole_image():
    image, label = scene(60, 40)
    got, got_label = Geometry(20, None)(image, label)
    assert got.size == got_label.size == (20, 20)
    assert np.array_equal(got, image.resize((20, 20), Image.Resampling.NEAREST))


def test_geometry__random_crop_is_joint_and_by_generator():
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90), dtype=np.uint8))
    results = [
        Geometry(32, "random")(grey.convert("RGB"), grey, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    for image, label in results:
        assert np.array_equal(np.asarray(image)[:, :, 0], label)
    assert np.array_equal(results[0][1], results[1][1])
    assert not np.array_equal(results[0][1], results[2][1])


def test_sizes__rounding():
    assert resized((480, 360), 224) == (int(224 * 480 / 360), 224)
    assert center_box((5, 5), (2, 4)) == (2, 0, 4, 4)  # 1.5 and 0.5 are rounded half to even


def test_normalise__equals_torchvision():
    image = torch.randint(256, (2, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalise(image), vision.normalize(image.float() / 255, MEAN, STD))


def test_eight_bit__floors():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    difference = image.int() - to_eight_bit(normalise(image)).int()
    assert set(difference.unique().tolist()) <= {0, 1}  # one below at most, never above
