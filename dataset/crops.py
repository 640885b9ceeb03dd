"""Five crops of each train image, cut on the fly or prepared as files."""

from pathlib import Path

from utils.training.randomness import derived_seed
from utils.vision.transforms import center_box

CROPS = 5
CROPS_FOLDER = "cropped"  # below data_path, of prepared crops


def crop_boxes(size: tuple[int, int], ratio: float, kind: str, index: int) -> list[tuple[int, int, int, int]]:
    """The five crop boxes (left, top, right, bottom) of an image of `size` (W, H).

    Kind "five" is top left, top right, bottom left, bottom right, centre; "random" takes offsets from
    SHA-256 of (index, k), a 63-bit number modulo the number of positions.
    """
    width, height = size
    w, h = max(1, int(width * ratio)), max(1, int(height * ratio))
    if kind == "five":
        corners = [(0, 0), (width - w, 0), (0, height - h), (width - w, height - h)]
        return [(left, top, left + w, top + h) for left, top in corners] + [center_box(size, (w, h))]
    boxes = []
    for k in range(CROPS):
        left = derived_seed(index, "left", k) % (width - w + 1)
        top = derived_seed(index, "top", k) % (height - h + 1)
        boxes.append((left, top, left + w, top + h))
    return boxes


def prepared_folder(data_path: Path, data_type: str, kind: str, ratio: float) -> Path:
    """The folder of prepared crops in the published layout."""
    return data_path / CROPS_FOLDER / f"{data_type}_{kind}_crop_{ratio}"
