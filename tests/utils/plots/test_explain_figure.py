import warnings

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from utils.plots.explain_figure import COLOURS, draw_explanation, painted
from utils.plots.explanation import AMBIGUOUS, ITSELF, NEGATIVE, POSITIVE, Explanation


def explanation(steps, images, *, phi=0.5, psi=0.1):
    drawn = np.random.default_rng(0)
    similarity = drawn.uniform(-0.2, 1, (steps + 1, images, 4, 5)).astype(np.float32)
    zones = np.select([similarity > phi, similarity < psi], [POSITIVE, NEGATIVE], AMBIGUOUS).astype(np.uint8)
    zones[:, 0, 3, 4] = ITSELF
    edges = (np.full(steps + 1, edge, dtype=np.float32) for edge in (phi, psi, 0.0))
    return Explanation((0, 3, 4), similarity, zones, *edges)


@pytest.mark.parametrize(
    ("steps", "images", "phi", "psi"),
    [(0, 1, 0.5, 0.1), (4, 2, 0.5, 0.1), (1, 1, -np.inf, np.inf), (1, 1, np.inf, -np.inf)],
)
def test_draw__any_steps_bank_and_boundaries(tmp_path, steps, images, phi, psi):
    pictures = np.random.default_rng(1).integers(0, 256, (images, 40, 40, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_explanation(
            tmp_path / "a.png",
            explanation(steps, images, phi=phi, psi=psi),
            pictures=pictures,
            names=[f"folder/a$b_{number}^.png" for number in range(images)],
            about="bank: this image alone",
        )
    width, height = Image.open(tmp_path / "a.png").size
    assert 700 <= width <= 1600
    assert height > 700


def test_painted__each_patch_has_its_sets_colour():
    zones = np.array([[POSITIVE, AMBIGUOUS], [NEGATIVE, ITSELF]], dtype=np.uint8)
    picture = painted(np.full((5, 5, 3), 255, dtype=np.uint8), zones)  # patches of two and three pixels
    assert picture.shape == (5, 5, 3)
    for (y, x), colour in {(0, 0): COLOURS[0], (0, 4): COLOURS[1], (4, 0): COLOURS[2]}.items():
        seen = picture[y, x].astype(float)
        assert np.corrcoef(seen, to_rgb(colour))[0, 1] > 0.99
    assert len(set(picture[4, 4].tolist())) == 1  # grey: the anchor is in no set
