"""Each data set in its official layout, in miniature: real JPEG, PNG and .mat files."""

import json

import numpy as np
from scipy.io import savemat

from dataset.dataset_download import COCO_LISTS
from tests.dataset.files import SIZE, picture, save


def spread(values):
    """A label that holds all of these values."""
    return np.resize(values, (SIZE[1], SIZE[0]))


def make_cocostuff(root, counts=(3, 3)):
    """Every label holds every fine id and 255."""
    for split, count in zip(("train2017", "val2017"), counts, strict=True):
        ids = [f"{number:012d}" for number in range(count)]
        for number, name in enumerate(ids):
            save(root / "images" / split / f"{name}.jpg", picture(number))
            save(root / "annotations" / split / f"{name}.png", spread(np.r_[np.arange(182), 255]))
        (root / "curated" / split).mkdir(parents=True)
        for listing in COCO_LISTS:
            if split in listing:
                (root / listing).write_text("\n".join(ids) + "\n")
    return root


def make_cityscapes(root, counts=(2, 2)):
    """Every label holds every official id and 255; two cities a split."""
    for split, count in zip(("train", "val"), counts, strict=True):
        for number in range(count):
            city = ("ulm", "aachen")[number % 2]
            name = f"{city}_{number:06d}_000019"
            save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", picture(number))
            label = spread(np.r_[np.arange(34), 255])
            save(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", label)
    return root


def make_potsdam(root, counts=(2, 2)):
    """potsdam and, below processed/, potsdamraw; every label holds the six classes and 255."""
    rng = np.random.default_rng(0)
    names = [f"2_{10 + number // 4}_{number % 4 // 2}_{number % 2}" for number in range(max(counts))]
    for folder in (root, root / "processed"):
        (folder / "imgs").mkdir(parents=True)
        (folder / "gt").mkdir()
        for name in names:
            image = rng.integers(0, 256, (200, 200, 4), dtype=np.uint8)
            savemat(folder / "imgs" / f"{name}.mat", {"img": image})
            gt = np.resize(np.r_[np.arange(6), 255], (200, 200)).astype(np.uint8)
            savemat(folder / "gt" / f"{name}.mat", {"gt": gt})
    for listing, count in zip(("labelled_train.txt", "labelled_test.txt"), counts, strict=True):
        (root / listing).write_text("\n".join(names[:count]) + "\n")
    return root


def make_directory(root, counts=(4, 2)):
    """Three classes and 255."""
    for split, count in zip(("train", "val"), counts, strict=True):
        for number in range(count):
            save(root / "imgs" / split / f"{number}.jpg", picture(number))
            save(root / "labels" / split / f"{number}.png", spread([0, 1, 2, 255]))
    about = {"n_classes": 3, "classes": ["a", "b", "c"], "ignore": 255}
    (root / "classes.json").write_text(json.dumps(about))
    return root
