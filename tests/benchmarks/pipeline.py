"""Items per second of the loaders, and an epoch from files to updated weights."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dataset import build_data, crop_datasets
from dataset.base import SegmentationDataset, Source
from dataset.crops import prepared_folder
from dataset.datamodule import SegmentationDataModule, prepared_crops
from dataset.image_folder import ImageFolder
from model.module import PPAPModule
from tests.benchmarks import literal
from tests.benchmarks.compute import LITERAL_BATCH, literal_losses, step_form
from tests.benchmarks.inputs import SHAPES, random_module, shape_options, write_photographs
from tests.benchmarks.measure import Bench, Row
from utils.config.loading import with_changes
from utils.config.options import Options
from utils.training.device import precision_settings
from utils.training.launch import cores
from utils.training.trainer import build_trainer
from utils.vision.transforms import Geometry

PHOTOGRAPHS = {"cpu": 8, "cuda": 128}  # of five crops each
CLASSES = 27


class TwoViews(Dataset):
    """Items as `literal.two_views` makes them."""

    def __init__(self, source: Source, res: int) -> None:
        self.source, self.res = source, res

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        raw = self.source.read(index)
        return literal.two_views(raw.image, raw.label, self.res, self.source.rule)


def photographs(root: Path, shape: str, bench: Bench) -> Options:
    """Options of an experiment on photographs, and their crops, that are written below a folder."""
    write_photographs(root, images=PHOTOGRAPHS[bench.device.type], n_classes=CLASSES)
    changed = {"dataset.data_type": "directory", "dataset.data_path": str(root), "dataset.crop_type": "five"}
    crop_datasets.main(["--opt", SHAPES[shape], *(f"{key}={value}" for key, value in changed.items())])
    if bench.device.type == "cpu":
        changed |= {"dataloader.batch_size": 8, "dataloader.num_workers": 2}
    return shape_options(shape, changed | {"train.epoch": 1, "dataset.cache_features": None})


def bench_data(bench: Bench, shape: str) -> list[Row]:
    """Items per second on prepared crops; crops cut on the fly decode four times the pixels."""
    with tempfile.TemporaryDirectory() as root:
        options = photographs(Path(root), shape, bench)
        chosen = options.dataset
        geometry = Geometry(chosen.res, "center", chosen.interpolation)
        prepared = prepared_crops(prepared_folder(Path(root), "directory", "five", 0.5), CLASSES)
        whole = ImageFolder(chosen, "train")

        def one_pass(items: Dataset) -> Callable[[], None]:
            size, workers = options.dataloader.batch_size, cores()
            loader = DataLoader(items, size, num_workers=workers, persistent_workers=True)
            return lambda: [None for _ in loader]

        forms = {
            "literal": one_pass(TwoViews(prepared, chosen.res)),
            "ours": one_pass(SegmentationDataset(prepared, geometry)),
            "ours, cut on the fly": one_pass(SegmentationDataset(whole, geometry, crops=(0.5, "five"))),
        }
        return bench.compare("data", forms, items=len(prepared))


def literal_epoch(bench: Bench, module: PPAPModule, source: Source, options: Options) -> Callable[[], None]:
    """Two views of each item, the literal loss, no cached tokens."""
    how = {"persistent_workers": True, "drop_last": True, "shuffle": True}
    how |= {"num_workers": options.dataloader.num_workers, "pin_memory": bench.device.type == "cuda"}
    loader = DataLoader(TwoViews(source, options.dataset.res), options.dataloader.batch_size, **how)
    module.to(bench.device)
    step = step_form(module, functools.partial(literal_losses, module))

    def run() -> None:
        module.to(bench.device)  # Lightning leaves it on the CPU
        for image, _, label in loader:
            step(image.to(bench.device, non_blocking=True), label.to(bench.device, non_blocking=True))

    return run


def hardware_of(bench: Bench, options: Options) -> dict[str, Any]:
    """The Trainer's settings for the measured device."""
    accelerator = bench.device.type
    return {"accelerator": accelerator, "devices": 1} | precision_settings(options, accelerator)


def fitted(bench: Bench, module: PPAPModule, data: SegmentationDataModule) -> Callable[[], None]:
    """An epoch by Lightning's loop, as run.py runs it, without validation."""
    loader = data.train_dataloader()

    def run() -> None:
        build_trainer(data.options, hardware_of(bench, data.options)).fit(module, loader)

    return run


def with_cached_tokens(
    bench: Bench, module: PPAPModule, data: SegmentationDataModule
) -> SegmentationDataModule:
    """The same items as tokens in memory."""
    options = with_changes(data.options, {"dataset.cache_features": "ram"})
    trainer = build_trainer(options, hardware_of(bench, options))
    encode = functools.partial(module.frozen_tokens, trainer=trainer)
    precision = trainer.precision_plugin.precision
    where = {"precision": precision, "device": module.device}
    return build_data(options).with_tokens(encode, backbone=module.segmenter.backbone, **where)


def bench_epoch(bench: Bench, shape: str) -> list[Row]:
    """An epoch on prepared crops: two views and the literal loss, ours, ours from cached tokens."""
    device = bench.device.type
    with tempfile.TemporaryDirectory() as root:
        options = photographs(Path(root), shape, bench)
        size, data = options.dataloader.batch_size, build_data(options)
        steps, module = len(data.train_set) // size, random_module(options, bench.device)
        forms = {"ours": fitted(bench, module, data)}
        if size <= LITERAL_BATCH[device]:
            forms["literal"] = literal_epoch(bench, module, data.train_set.source, options)
        forms["ours, cached tokens"] = fitted(bench, module, with_cached_tokens(bench, module, data))
        return bench.compare(f"epoch of {steps} steps", forms, items=steps * size)
