"""Items a second of the loaders, and an epoch from files to updated weights."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dataset import build_data
from dataset.base import SegmentationDataset, Source
from dataset.crops import prepared_folder
from dataset.datamodule import SegmentationDataModule, prepared_crops
from dataset.image_folder import ImageFolder
from model.module import PPAPModule
from tests.benchmarks import literal
from tests.benchmarks.compute import LITERAL_BATCH, literal_losses, network_cost, step_form, step_loss_cost
from tests.benchmarks.inputs import random_module, shape_options, write_photographs
from tests.benchmarks.measure import Bench, Row
from utils.config.loading import with_changes
from utils.config.options import Options
from utils.training.device import precision_settings
from utils.training.launch import cores
from utils.training.run_dir import Progress
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


def one_pass(dataset: Dataset, batch_size: int) -> Callable[[], None]:
    """Reads a data set once; the workers stay."""
    workers = cores()
    loader = DataLoader(dataset, batch_size, num_workers=workers, persistent_workers=True)
    return lambda: [None for _ in loader]


def photographs(root: Path, shape: str, bench: Bench) -> Options:
    """Options of an experiment on photographs that are written below a folder."""
    images = PHOTOGRAPHS[bench.device.type]
    write_photographs(root, images=images, n_classes=CLASSES)
    changed = {"data_type": "directory", "data_path": str(root), "crop_type": "five"}
    sizes = {} if bench.device.type == "cuda" else {"batch_size": 8, "num_workers": 2}
    return shape_options(shape, dataset=changed, dataloader=sizes)


def bench_data(bench: Bench, shape: str) -> list[Row]:
    """Items a second on prepared crops; crops cut on the fly decode four times the pixels."""
    with tempfile.TemporaryDirectory() as root:
        options = photographs(Path(root), shape, bench)
        chosen = options.dataset
        geometry = Geometry(chosen.res, "center", chosen.interpolation)
        prepared = prepared_crops(prepared_folder(Path(root), "directory", "five", 0.5), CLASSES)
        whole = ImageFolder(chosen, "train")
        size = options.dataloader.batch_size
        forms = {
            "literal": one_pass(TwoViews(prepared, chosen.res), size),
            "ours": one_pass(SegmentationDataset(prepared, geometry), size),
            "ours, cut on the fly": one_pass(SegmentationDataset(whole, geometry, crops=(0.5, "five")), size),
        }
        return bench.compare("data", forms, items=len(prepared))


def literal_epoch(bench: Bench, module: PPAPModule, source: Source, options: Options) -> Callable[[], None]:
    """Two views of each item, the literal loss, no token kept."""
    device = bench.device
    items = TwoViews(source, options.dataset.res)
    loader = DataLoader(
        items,
        options.dataloader.batch_size,
        num_workers=options.dataloader.num_workers,
        persistent_workers=True,
        drop_last=True,
        shuffle=True,
        pin_memory=device.type == "cuda",
    )
    optimizer = module.to(device).configure_optimizers()
    given: dict[str, torch.Tensor] = {}
    step = step_form(module, optimizer, lambda: literal_losses(module, **given))

    def run() -> None:
        module.to(device)  # Lightning leaves it on the CPU
        for image, _, label in loader:
            given.update(image=image.to(device, non_blocking=True), label=label.to(device, non_blocking=True))
            step()

    return run


def hardware_of(bench: Bench, options: Options) -> dict[str, Any]:
    """The Trainer's settings for the device that is measured, whatever else there is."""
    accelerator = bench.device.type
    return {"accelerator": accelerator, "devices": 1} | precision_settings(options, accelerator)


def fitted(bench: Bench, module: PPAPModule, data: SegmentationDataModule) -> Callable[[], None]:
    """An epoch by Lightning's loop, as run.py runs it, without validation."""
    loader = data.train_dataloader()

    def run() -> None:
        module.follow(data.schedule, Progress())
        hardware = hardware_of(bench, data.options)
        trainer = build_trainer(data.options, hardware)
        trainer.fit(module, loader)

    return run


def cached_data(bench: Bench, module: PPAPModule, options: Options) -> SegmentationDataModule:
    """The same items as tokens in memory."""
    data = build_data(with_changes(options, {"dataset.cache_features": "ram"}))
    trainer = build_trainer(options, hardware_of(bench, options))
    encode = functools.partial(module.frozen_tokens, trainer=trainer)
    precision = trainer.precision_plugin.precision
    return data.with_tokens(encode, backbone=module.segmenter.backbone, precision=precision)


def bench_epoch(bench: Bench, shape: str) -> list[Row]:
    """An epoch on prepared crops: two views and the literal loss, ours, ours from cached tokens."""
    with tempfile.TemporaryDirectory() as root:
        options = with_changes(photographs(Path(root), shape, bench), {"train.epoch": 1})
        size = options.dataloader.batch_size
        data = build_data(options)
        steps = len(data.train_set) // size
        module = random_module(options, bench.device)
        forms = {"ours": fitted(bench, module, data)}
        if size <= LITERAL_BATCH[bench.device.type]:
            forms["literal"] = literal_epoch(bench, module, data.train_set.source, options)
        forms["ours, cached tokens"] = fitted(bench, module, cached_data(bench, module, options))
        operand = torch.float16 if bench.device.type == "cuda" else torch.float32
        loss = step_loss_cost(options)
        costs = {
            "ours": [network_cost(options, operand), loss] * steps,
            "ours, cached tokens": [network_cost(options, operand, cached=True), loss] * steps,
        }
        return bench.compare(f"epoch of {steps} steps", forms, costs=costs, items=steps * size)
