"""The data module: opens the splits of a data set and builds their loaders."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from dataset.base import SegmentationDataset, Source
from dataset.crops import CROPS, CropSource, PreparedCrops, prepared_folder
from dataset.samplers import EvaluationBatchSampler, TrainBatchSampler
from dataset.token_cache import Encoder, TokenDataset, cache_tokens
from dataset.verify import check_splits
from utils.config.options import DatasetOptions, Options
from utils.errors import UserError
from utils.vision.labels import LabelSpace
from utils.vision.transforms import Geometry


@dataclass(frozen=True)
class DataSetKind:
    """A registered data set: its classes and, by split, its items."""

    labels: Callable[[DatasetOptions], LabelSpace]
    source: Callable[[DatasetOptions, str], Source]
    cropped: bool = True  # whether `dataset.crop_type` applies


class SegmentationDataModule(LightningDataModule):
    """Train and validation data of a run; `dataset.build_data` makes one.

    Args:
        options: all options.
        kind: registry entry of `dataset.data_type`.
        train_set: train items; None if there is only an evaluation.
        validation_set: validation items, possibly none.
        damaged: one error message per item that was skipped.

    Raises:
        UserError: there are fewer train items than a batch.
    """

    def __init__(
        self,
        options: Options,
        kind: DataSetKind,
        *,
        train_set: SegmentationDataset | TokenDataset | None,
        validation_set: SegmentationDataset | TokenDataset,
        damaged: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.options, self.kind, self.damaged = options, kind, tuple(damaged)
        self.labels: LabelSpace = kind.labels(options.dataset)
        self.train_set, self.validation_set = train_set, validation_set
        if train_set is not None:
            self._check_batch()

    @classmethod
    def from_options(
        cls, options: Options, kind: DataSetKind, *, train: bool = True
    ) -> SegmentationDataModule:
        """Opens the data at once, so that mistakes show before weights are loaded.

        Args:
            options: all options.
            kind: registry entry of `dataset.data_type`.
            train: whether to open the train split too; an evaluation needs none.

        Raises:
            UserError: the data is missing or, if checked, damaged, or has fewer train items than a batch.
        """
        chosen, damaged = options.dataset, []
        whole, to_crop = open_train(chosen, kind) if train else (None, False)
        sources = {} if whole is None else {"train": whole}
        sources["val"] = kind.source(chosen, "val")
        for split, source in sources.items():
            if source.official_size not in (None, len(source)):
                print(f"{split}: {len(source):,} images; the official split has {source.official_size:,}")
        if chosen.check_files or chosen.skip_damaged:
            workers = options.dataloader.num_workers
            sources, damaged = check_splits(sources, skip=chosen.skip_damaged, workers=workers)
        train_set = None
        if train:
            whole = sources["train"]
            items = CropSource(whole, chosen.crop_ratio, chosen.crop_type) if to_crop else whole
            geometry = Geometry(chosen.res, chosen.loader_crop_type, chosen.interpolation)
            train_set = SegmentationDataset(items, geometry, seed=options.train.seed)
        geometry = Geometry(chosen.val_res, "center", chosen.interpolation)
        validation_set = SegmentationDataset(sources["val"], geometry)
        return cls(options, kind, train_set=train_set, validation_set=validation_set, damaged=damaged)

    def with_tokens(self, encode: Encoder, *, backbone: Any, precision: str) -> SegmentationDataModule:
        """The same data with cached tokens in place of images, as `dataset.cache_features` asks.

        Args:
            encode: images (B, 3, H, W) uint8 -> tokens (B, T, D).
            backbone: has `token_shape(res)` and `digest()`.
            precision: of `encode`.
        """
        model = {"weights": backbone.digest(), "precision": precision}

        def cached(items: SegmentationDataset, split: str) -> SegmentationDataset | TokenDataset:
            if not len(items):
                return items
            shape = backbone.token_shape(items.geometry.res)
            return cache_tokens(items, encode, self.options, split=split, shape=shape, model=model)

        return SegmentationDataModule(
            self.options,
            self.kind,
            train_set=cached(self.train_set, "train"),
            validation_set=cached(self.validation_set, "val"),
            damaged=self.damaged,
        )

    def _check_batch(self) -> None:
        items, batch = len(self.train_set), self.options.dataloader.batch_size
        if items < batch:
            raise UserError(
                f"dataloader.batch_size is {batch}, but there are only {items} train items, and the last "
                f"partial batch is dropped; set dataloader.batch_size={items} or less, or add images"
            )

    def image_names(self, step: int) -> list[str]:
        """The images of a training step, from 1."""
        return [self.train_set.source.name(index) for index in self._batches(0).batch(step)]

    def _batches(self, first_step: int) -> TrainBatchSampler:
        batch_size, seed = self.options.dataloader.batch_size, self.options.train.seed
        return TrainBatchSampler(len(self.train_set), batch_size, seed=seed, first_step=first_step)

    @property
    def train_labelled(self) -> bool:
        """Whether train items have labels for the linear probe."""
        return self.train_set is not None and self.train_set.source.labelled

    @property
    def validation_labelled(self) -> bool:
        """Whether validation items have labels to compute metrics from."""
        return len(self.validation_set) > 0 and self.validation_set.source.labelled

    def example_split(self) -> SegmentationDataset:
        """The validation split; without validation images, the train split at its geometry."""
        if len(self.validation_set):
            return self.validation_set
        return SegmentationDataset(
            self.kind.source(self.options.dataset, "train"), self.validation_set.geometry
        )

    def train_dataloader(self) -> DataLoader:
        """The batches of an epoch; a resumed run starts with the step that follows the last trained one."""
        return self._loader(self.train_set, self._batches(self.trainer.global_step if self.trainer else 0))

    def val_dataloader(self) -> DataLoader:
        """All validation images, in order, for the validations of training."""
        return self._loader(self.validation_set, self._dealt_out(self.options.dataloader.val_batch_size))

    def evaluation_dataloader(self) -> DataLoader:
        """All validation images, in order, for the final evaluation."""
        return self._loader(self.validation_set, self._dealt_out(self.options.eval.batch_size))

    def _dealt_out(self, batch_size: int) -> EvaluationBatchSampler:
        return EvaluationBatchSampler(len(self.validation_set), batch_size)

    def _loader(self, dataset: SegmentationDataset | TokenDataset, batches: Sampler) -> DataLoader:
        in_memory = isinstance(dataset, TokenDataset) and self.options.dataset.cache_features == "ram"
        workers = 0 if in_memory else self.options.dataloader.num_workers
        return DataLoader(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            batch_sampler=batches,
        )


def open_train(options: DatasetOptions, kind: DataSetKind) -> tuple[Source, bool]:
    """The train split, and whether to cut crops from its images: prepared crops are used if they exist."""
    if options.crop_type is None or not kind.cropped:
        if options.crop_type is not None:
            unused = f"dataset.crop_type is {options.crop_type}: ignored"
            print(f"{unused}, {options.data_type} trains on whole images")
        return kind.source(options, "train"), False
    folder = prepared_folder(
        Path(options.data_path), options.data_type, options.crop_type, options.crop_ratio
    )
    if folder.is_dir():
        crops = PreparedCrops(folder, "train", kind.labels(options).n_classes)
        check_all_prepared(crops, folder, options, kind)
        print(f"train crops: {len(crops)} in {folder}")
        return crops, False
    print(f"train crops: {options.crop_type}, ratio {options.crop_ratio}, cut on the fly")
    return kind.source(options, "train"), True


def check_all_prepared(crops: Source, folder: Path, options: DatasetOptions, kind: DataSetKind) -> None:
    """Compares the number of prepared crops with that of the whole images, if these exist.

    Raises:
        UserError: some crops are missing, or they were cut from other images.
    """
    try:
        expected = CROPS * len(kind.source(options, "train"))
    except UserError:  # the whole images were removed
        return
    if len(crops) > expected or (len(crops) < expected and not options.skip_damaged):
        raise UserError(
            f"{folder}: contains {len(crops):,} crops, must contain {expected:,} (five per train image); "
            "write the missing ones with: python dataset/crop_datasets.py --opt <option file> --data_path "
            f"{shlex.quote(options.data_path)}; or remove the folder to cut them during training"
        )
