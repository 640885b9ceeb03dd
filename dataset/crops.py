"""Five crops of each train image, prepared as files or cut on the fly."""

from __future__ import annotations

from pathlib import Path

from dataset.base import FileSource, RawItem, Source, class_rule
from utils.errors import UserError
from utils.training.randomness import derived_seed
from utils.vision.transforms import center_box

CROPS = 5
CROPS_FOLDER = "cropped"  # below data_path, of prepared crops
Box = tuple[int, int, int, int]


def crop_boxes(size: tuple[int, int], ratio: float, kind: str, index: int) -> list[Box]:
    """The five crop boxes (left, top, right, bottom) of an image.

    Args:
        size: (W, H) of the image.
        ratio: size of a crop as a fraction of each side.
        kind: "five" is top left, top right, bottom left, bottom right, centre; "random" takes offsets from
            SHA-256 of (index, k), a 63-bit number modulo the number of positions.
        index: index of the image in its complete split.
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


class CropSource(Source):
    """Item 5 * index + k is crop k of image `index` of another source.

    Args:
        whole: the source of whole images.
        ratio: `dataset.crop_ratio`.
        kind: `dataset.crop_type`.
    """

    def __init__(self, whole: Source, ratio: float, kind: str) -> None:
        self.whole, self.ratio, self.kind = whole, ratio, kind
        self.rule, self.labelled = whole.rule, whole.labelled

    def __len__(self) -> int:
        return CROPS * len(self.whole)

    def read(self, index: int) -> RawItem:
        """Reads an image and its label and crops both."""
        raw = self.whole.read(index // CROPS)
        original = self.whole.original_index(index // CROPS)
        box = crop_boxes(raw.image.size, self.ratio, self.kind, original)[index % CROPS]
        return RawItem(raw.image.crop(box), None if raw.label is None else raw.label.crop(box))

    def name(self, index: int) -> str:
        """The image's name and the crop's number."""
        return f"{self.whole.name(index // CROPS)} (crop {index % CROPS})"

    def digest(self) -> str:
        """That of the images, and the crops."""
        return f"{self.whole.digest()} {self.kind} {self.ratio}"


def prepared_folder(data_path: Path, data_type: str, kind: str, ratio: float) -> Path:
    """The folder of prepared crops in the published layout."""
    return data_path / CROPS_FOLDER / f"{data_type}_{kind}_crop_{ratio}"


class PreparedCrops(FileSource):
    """Crops stored as img/<split>/<5*index+k>.jpg and label/<split>/<5*index+k>.png (class + 1, 0 = ignore).

    Args:
        folder: as `prepared_folder` says.
        split: "train".
        n_classes: of the data set.

    Raises:
        UserError: the folder contains no crop.
    """

    def __init__(self, folder: Path, split: str, n_classes: int) -> None:
        images = sorted(
            (path for path in (folder / "img" / split).glob("*.jpg") if path.stem.isdecimal()),
            key=lambda path: int(path.stem),
        )
        if not images:
            raise UserError(f"{folder / 'img' / split}: holds no <number>.jpg; prepare it or remove {folder}")
        labels = folder / "label" / split
        labelled = labels.is_dir()  # asked once: there are five crops an image
        targets = [labels / f"{path.stem}.png" if labelled else None for path in images]
        classes = {class_id + 1: class_id for class_id in range(n_classes)}
        super().__init__(images, targets, rule=class_rule(classes, ignored=[0]))
