"""Image files that the tests of data sets make."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (60, 44)  # width, height


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3))


def names(items):
    """The file names of a data set's images."""
    return [Path(items.name(index)).name for index in range(len(items))]
