"""Procedural scenes whose classes differ in texture, not in colour; needs no files.

Each scene is a Voronoi-like partition with wavy borders. Each of its four regions has a different texture in
two random colours, with random phase, period and shading, and all are noisy. A scene depends on
(split, index) alone and has the size at which it is used.
"""

import colorsys

import numpy as np
from PIL import Image

from dataset.base import RawItem, Source, class_rule
from utils.config.options import DatasetOptions
from utils.training.randomness import derived_seed
from utils.vision.labels import LabelSpace

NAMES = ("plain", "rows", "columns", "diagonals")
NOISE = 0.2  # standard deviation; colours range from 0 to 1


def labels(options: DatasetOptions) -> LabelSpace:
    """The textures."""
    return LabelSpace.with_spread_colours(NAMES)


class Synthetic(Source):
    """One split, "train" or "val"."""

    def __init__(self, options: DatasetOptions, split: str) -> None:
        train = split == "train"
        self.split, self.side = split, options.res if train else options.val_res
        self.count = options.train_images if train else options.val_images
        self.rule = class_rule({i: i for i in range(len(NAMES))})

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> RawItem:
        """Draws a scene."""
        rng = np.random.default_rng(derived_seed(0, "scene", self.split, index))
        regions = _regions(self.side, rng)  # (S, S), region ids
        image = np.zeros((self.side, self.side, 3))
        label = np.zeros((self.side, self.side), dtype=np.uint8)
        for region, class_id in enumerate(rng.permutation(len(NAMES))):
            y, x = np.nonzero(regions == region)  # (P,) each, the region's pixels
            image[y, x] = _paint(NAMES[class_id], y, x, self.side, rng)
            label[y, x] = class_id
        image += rng.normal(0, NOISE, image.shape)
        return RawItem(Image.fromarray((255 * image.clip(0, 1)).astype(np.uint8)), Image.fromarray(label))

    def name(self, index: int) -> str:
        """Split and index."""
        return f"synthetic {self.split} scene {index}"


def _regions(side: int, rng: np.random.Generator) -> np.ndarray:
    """(S, S) index of the nearest seed after a wavy warp; one seed per texture."""
    y, x = np.mgrid[:side, :side] / side
    waves, phases = rng.uniform(1, 3, 2), rng.uniform(0, 2 * np.pi, 2)
    warped_x = x + 0.05 * np.sin(2 * np.pi * waves[0] * y + phases[0])
    warped_y = y + 0.05 * np.sin(2 * np.pi * waves[1] * x + phases[1])
    seeds = rng.uniform(0.1, 0.9, (len(NAMES), 2, 1, 1))
    return np.argmin((warped_y - seeds[:, 0]) ** 2 + (warped_x - seeds[:, 1]) ** 2, axis=0)


def _paint(texture: str, y: np.ndarray, x: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """(P, 3) colours of a texture at pixels (y, x), (P,) each, between a dark and a light colour."""
    period = rng.uniform(5.0, 7.0)  # pixels
    row, column = 2 * np.pi * (np.stack((y, x)) / period + rng.uniform(0, 1, (2, 1)))  # (P,) each, phases
    if texture == "plain":
        pattern = np.full(len(y), rng.uniform())  # (P,) in [0, 1], as below
    else:
        waves = {
            "rows": np.sin(row),
            "columns": np.sin(column),
            "diagonals": np.sin((row + column * rng.choice((-1, 1))) / np.sqrt(2)),
        }
        pattern = (waves[texture] > 0).astype(float)
    values = rng.uniform(0.1, 0.3), rng.uniform(0.75, 0.95)
    dark, light = (np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.6), v)) for v in values)
    shade = 1 + rng.uniform(-0.2, 0.2) * (x / side - 0.5) + rng.uniform(-0.2, 0.2) * (y / side - 0.5)
    return (dark + pattern[:, None] * (light - dark)) * shade[:, None]
