"""Data sets by name; `build_data` is the factory. One file a data set, one line here."""

from __future__ import annotations

from dataset import cityscapes, cocostuff, directory, potsdam, synthetic
from dataset.datamodule import DataSetKind, SegmentationData
from utils.options import Options

DATA_SETS = {
    "cocostuff27": DataSetKind(cocostuff.labels, cocostuff.CocoStuff),
    "cocostuff15": DataSetKind(cocostuff.labels, cocostuff.CocoStuff),
    "cocostuff3": DataSetKind(cocostuff.labels, cocostuff.CocoStuff),
    "cityscapes": DataSetKind(cityscapes.labels, cityscapes.Cityscapes),
    "potsdam": DataSetKind(potsdam.labels, potsdam.Potsdam),
    "potsdamraw": DataSetKind(potsdam.labels, potsdam.Potsdam),
    "directory": DataSetKind(directory.labels, directory.Directory),
    "synthetic": DataSetKind(synthetic.labels, synthetic.Synthetic),
}

__all__ = ["DATA_SETS", "build_data"]


def build_data(options: Options, *, train: bool = True) -> SegmentationData:
    """The data of a run; see `SegmentationData`."""
    return SegmentationData(options, DATA_SETS[options.dataset.data_type], train=train)
