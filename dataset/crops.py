"""Five crops of each train image: from the prepared folder, or cut on the fly."""

from __future__ import annotations

from pathlib import Path

from dataset.base import INVALID, FileSource, RawItem, Source, class_rule
from utils.errors import UserError
from utils.training.randomness import derived_seed
from utils.vision.labels import IGNORE
from utils.vision.transforms import center_box

CROPS = 5
CROPS_FOLDER = "cropped"  # below data_path, of prepared crops
Box = tuple[int, int, int, int]


def crop_boxes(size: tuple[int, int], ratio: float, kind: str, index: int) -> list[Box]:
    """The five (left, top, right, bottom) of an image.

    Args:
        size: (W, H) of the image.
        ratio: size of a crop as a share of each side.
        kind: "five": top left, top right, bottom left, bottom right, centre. "random": offsets from SHA-256
            of (index, k), read as 63-bit numbers, modulo the number of places.
        index: the image's place in its split.
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
        """The whole image and label, cut to the crop."""
        raw = self.whole.read(index // CROPS)
        place = self.whole.place(index // CROPS)
        box = crop_boxes(raw.image.size, self.ratio, self.kind, place)[index % CROPS]
        return RawItem(raw.image.crop(box), None if raw.label is None else raw.label.crop(box))

    def name(self, index: int) -> str:
        """The image's name and the crop's number."""
        return f"{self.whole.name(index // CROPS)} (crop {index % CROPS})"

    def stamp(self, index: int) -> str:
        """The image's stamp and which crop of it."""
        return f"{self.whole.stamp(index // CROPS)} {self.kind} {self.ratio} {index % CROPS}"


def prepared_folder(data_path: Path, data_type: str, kind: str, ratio: float) -> Path:
    """Where the published layout keeps prepared crops."""
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

    cropped = True

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
        super().__init__(images, targets, rule=class_rule({0: IGNORE} | classes, other=INVALID))
