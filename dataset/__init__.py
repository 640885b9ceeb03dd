"""Data sets by name; `build_data` is the factory. One file a data set, one line here."""

from __future__ import annotations

from collections.abc import Callable

from dataset import cityscapes, cocostuff, potsdam, synthetic
from dataset import image_folder as directory
from dataset.base import FileSource, RawItem, Source, class_rule
from dataset.datamodule import DataSetKind, SegmentationData
from utils.config.options import DATA_TYPES, WITHOUT_FOLDER, DatasetOptions, Options
from utils.vision.labels import LabelSpace

DATA_SETS = {
    "cocostuff27": DataSetKind(cocostuff.labels, cocostuff.CocoStuff),
    "cocostuff15": DataSetKind(cocostuff.labels, cocostuff.CocoStuff, cropped=False),
    "cocostuff3": DataSetKind(cocostuff.labels, cocostuff.CocoStuff, cropped=False),
    "cityscapes": DataSetKind(cityscapes.labels, cityscapes.Cityscapes),
    "potsdam": DataSetKind(potsdam.labels, potsdam.Potsdam, cropped=False),
    "potsdamraw": DataSetKind(potsdam.labels, potsdam.Potsdam, cropped=False),
    "directory": DataSetKind(directory.labels, directory.Directory),
    "synthetic": DataSetKind(synthetic.labels, synthetic.Synthetic),
}

__all__ = [
    "DATA_SETS",
    "FileSource",
    "RawItem",
    "Source",
    "build_data",
    "class_rule",
    "register_data_set",
]


def build_data(options: Options, *, train: bool = True) -> SegmentationData:
    """The data of a run; see `SegmentationData`."""
    return SegmentationData(options, DATA_SETS[options.dataset.data_type], train=train)


def register_data_set(
    name: str,
    *,
    labels: Callable[[DatasetOptions], LabelSpace],
    source: Callable[[DatasetOptions, str], Source],
    needs_folder: bool = True,
) -> None:
    """Makes a data set of your own known as `dataset.data_type=<name>`.

    Args:
        name: not yet taken.
        labels: from `dataset.*` to class names and colours.
        source: from `dataset.*` and the split, "train" or "val", to its items; a class such as `FileSource`.
        needs_folder: whether `dataset.data_path` must name a folder.

    Raises:
        ValueError: the name is taken.
    """
    if name in DATA_SETS:
        raise ValueError(f"data set {name} is there already; take another name")
    DATA_SETS[name] = DataSetKind(labels, source)
    DATA_TYPES.append(name)
    if not needs_folder:
        WITHOUT_FOLDER.add(name)
