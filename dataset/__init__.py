"""Data sets by name; `build_data` is the factory, `register_data_set` adds your own."""

from collections.abc import Callable

from dataset import cityscapes, cocostuff, image_folder, potsdam, synthetic
from dataset.base import DataSetKind, FileSource, RawItem, Source, class_rule
from dataset.datamodule import SegmentationDataModule
from utils.config.options import DATA_TYPES, WITHOUT_FOLDER, DatasetOptions, Options, register_name
from utils.errors import UserError
from utils.vision.labels import LabelSpace

DATA_SETS = {
    "cocostuff27": DataSetKind(cocostuff.labels, cocostuff.CocoStuff),
    "cocostuff15": DataSetKind(cocostuff.labels, cocostuff.CocoStuff, cropped=False),
    "cocostuff3": DataSetKind(cocostuff.labels, cocostuff.CocoStuff, cropped=False),
    "cityscapes": DataSetKind(cityscapes.labels, cityscapes.Cityscapes),
    "potsdam": DataSetKind(potsdam.labels, potsdam.Potsdam, cropped=False),
    "potsdamraw": DataSetKind(potsdam.labels, potsdam.Potsdam, cropped=False),
    "directory": DataSetKind(image_folder.labels, image_folder.ImageFolder),
    "synthetic": DataSetKind(synthetic.labels, synthetic.Synthetic),
}


def build_data(options: Options, *, train: bool = True) -> SegmentationDataModule:
    """The data of a run, or with `train=False` of an evaluation."""
    return SegmentationDataModule(options, DATA_SETS[options.dataset.data_type], train=train)


def known_labels(options: DatasetOptions) -> LabelSpace | None:
    """The classes of `dataset.data_type`, or None if they are stored with data that is missing."""
    try:
        return DATA_SETS[options.data_type].labels(options)
    except UserError:
        return None


def register_data_set(
    name: str,
    *,
    labels: Callable[[DatasetOptions], LabelSpace],
    source: Callable[[DatasetOptions, str], Source],
    needs_folder: bool = True,
) -> None:
    """Makes your own data set available as `dataset.data_type=<name>`.

    Args:
        name: must not be built in; registering a name again replaces it.
        labels: from `dataset.*` to class names and colours (at most 255).
        source: from `dataset.*` and a split, "train" or "val", to its items.
        needs_folder: whether `dataset.data_path` must name a folder.
    """
    register_name(DATA_TYPES, name)
    DATA_SETS[name] = DataSetKind(labels, source)
    (WITHOUT_FOLDER.discard if needs_folder else WITHOUT_FOLDER.add)(name)
