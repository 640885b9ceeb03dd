import warnings

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from utils.plots.explain_figure import (
    AMBIGUOUS,
    ANCHOR,
    NEGATIVE,
    POSITIVE,
    Explanation,
    draw_explanation,
    painted,
)
from utils.plots.figures import SET_COLOURS


@pytest.mark.parametrize(
    ("steps", "images", "phi", "psi"), [(0, 1, 0.5, 0.1), (4, 2, 0.5, 0.1), (1, 1, -np.inf, np.inf)]
)
def test_draw__any_steps_bank_and_boundaries(tmp_path, steps, images, phi, psi):
    drawn = np.random.default_rng(0)
    similarity = drawn.uniform(-0.2, 1, (steps + 1, images, 4, 5)).astype(np.float32)
    zones = np.select([similarity > phi, similarity < psi], [POSITIVE, NEGATIVE], AMBIGUOUS).astype(np.uint8)
    zones[:, 0, 3, 4] = ANCHOR
    numbers = (np.full(steps + 1, value, dtype=np.float32) for value in (phi, psi, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of matplotlib's own calls
        draw_explanation(
            tmp_path / "a.png",
            Explanation((3, 4), similarity, zones, *numbers),
            pictures=drawn.integers(0, 256, (images, 40, 40, 3), dtype=np.uint8),
            names=[f"folder/a$b_{number}^.png" for number in range(images)],
        )
    width, height = Image.open(tmp_path / "a.png").size
    assert 600 <= width <= 1600
    assert height > 700


def test_painted__each_patch_has_the_colour_of_its_set():
    zones = np.array([[POSITIVE, AMBIGUOUS], [NEGATIVE, ANCHOR]], dtype=np.uint8)
    picture = painted(np.full((4, 4, 3), 255, dtype=np.uint8), zones)
    for (y, x), colour in {(0, 1): SET_COLOURS[0], (0, 2): SET_COLOURS[1], (3, 0): SET_COLOURS[2]}.items():
        assert np.corrcoef(picture[y, x].astype(float), to_rgb(colour))[0, 1] > 0.99
    assert len(set(picture[3, 3].tolist())) == 1  # grey: the anchor is in no set
