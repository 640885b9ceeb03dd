"""Loaders: batches that are a function of seed and step, and the sizes of train and evaluation batches."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dataset.base import SegmentationDataset, Source
from dataset.crops import CROPS, CropSource, PreparedCrops, prepared_folder
from dataset.samplers import EvaluationBatchSampler, TrainBatchSampler
from dataset.token_cache import TokenDataset, cached
from dataset.verify import check_splits
from utils.config.options import WITHOUT_FOLDER, DatasetOptions, Options
from utils.errors import UserError
from utils.files import TOKENS_FOLDER, make_folder
from utils.vision.labels import LabelSpace
from utils.vision.transforms import Geometry


@dataclass(frozen=True)
class DataSetKind:
    """A data set as the registry holds it.

    Attributes:
        labels: from `dataset.*` to its classes.
        source: from `dataset.*` and a split to its items.
        cropped: whether `dataset.crop_type` acts on it.
    """

    labels: Callable[[DatasetOptions], LabelSpace]
    source: Callable[[DatasetOptions, str], Source]
    cropped: bool = True


class SegmentationData(LightningDataModule):
    """Train and validation data of a run; opened at once, so that a mistake shows before weights load.

    Args:
        options: all options.
        kind: the entry of the registry that `dataset.data_type` names.
        train: whether train data is wanted (evaluation needs none).

    Attributes:
        damaged: what is wrong with each item that was left out.

    Raises:
        UserError: the data is not where the options say, damaged (where that is checked), or has fewer
            train items than a batch.
    """

    def __init__(self, options: Options, kind: DataSetKind, *, train: bool = True) -> None:
        super().__init__()
        self.options, self.kind = options, kind
        chosen = options.dataset
        self.labels: LabelSpace = kind.labels(chosen)
        sources = {"train": train_source(chosen, kind, self.labels.n_classes)} if train else {}
        sources["val"] = kind.source(chosen, "val")
        for split, source in sources.items():
            if source.official not in (None, len(source)):
                print(f"{split}: {len(source):,} images; the official split has {source.official:,}")
        self.damaged: tuple[str, ...] = ()
        if chosen.check_files or chosen.skip_damaged:
            checked = check_splits(sources, skip=chosen.skip_damaged, workers=options.dataloader.num_workers)
            sources = {split: found.source for split, found in checked.items()}
            self.damaged = tuple(line for found in checked.values() for line in found.damaged)
        self.validation_set: SegmentationDataset | TokenDataset = SegmentationDataset(
            sources["val"], Geometry(chosen.val_res, "center", chosen.interpolation)
        )
        self.train_set: SegmentationDataset | TokenDataset | None = None
        if train:
            geometry = Geometry(chosen.res, chosen.loader_crop_type, chosen.interpolation)
            items = cut_on_the_fly(chosen, kind, sources["train"])
            self.train_set = SegmentationDataset(items, geometry, seed=options.train.seed)
            self._check_batch()

    def keep_tokens(self, encode: Callable[[Tensor], Tensor], *, backbone: Any, precision: str) -> None:
        """Replaces the images of both splits by their tokens, as `dataset.cache_features` says.

        Args:
            encode: images (B, 3, H, W) uint8 to tokens (B, T, D).
            backbone: has `token_shape(res)` and `digest()`.
            precision: that `encode` computes in.
        """
        chosen = self.options.dataset
        folder = Path(self.options.output_dir) / TOKENS_FOLDER if chosen.cache_features == "disk" else None
        about = {"weights": backbone.digest(), "precision": precision}

        def tokens_of(items: SegmentationDataset, split: str) -> TokenDataset:
            return cached(
                items,
                encode,
                shape=backbone.token_shape(items.geometry.res),
                folder=folder,
                about=about,
                batch_size=self.options.dataloader.val_batch_size,
                workers=self.options.dataloader.num_workers,
                split=split,
            )

        shared = folder is not None and self.options.trainer.world_size > 1
        with FileLock(make_folder(folder.parent) / f".{folder.name}.lock") if shared else nullcontext():
            self.train_set = tokens_of(self.train_set, "train")  # the first process computes, others read
            if len(self.validation_set):
                self.validation_set = tokens_of(self.validation_set, "val")

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
        """Whether train items have labels, so that the linear probe can be trained."""
        return self.train_set is not None and self.train_set.source.labelled

    @property
    def validation_labelled(self) -> bool:
        """Whether the validation split has images with labels, so that metrics exist."""
        return len(self.validation_set) > 0 and self.validation_set.source.labelled

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
        workers = 0 if in_memory else self.options.dataloader.num_workers  # nothing is left to decode
        return DataLoader(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            batch_sampler=batches,
        )


def train_source(options: DatasetOptions, kind: DataSetKind, n_classes: int) -> Source:
    """The train split: prepared crops where they are wanted and their folder is there, else whole images."""
    if options.crop_type is not None and not kind.cropped:
        print(
            f"dataset.crop_type is {options.crop_type}: ignored, {options.data_type} trains on whole images"
        )
    elif options.crop_type is not None and options.data_type not in WITHOUT_FOLDER:
        folder = prepared_folder(
            Path(options.data_path), options.data_type, options.crop_type, options.crop_ratio
        )
        if folder.is_dir():
            crops = PreparedCrops(folder, "train", n_classes)
            check_all_prepared(crops, folder, options, kind)
            print(f"train crops: {len(crops)} in {folder}")
            return crops
    return kind.source(options, "train")


def check_all_prepared(crops: Source, folder: Path, options: DatasetOptions, kind: DataSetKind) -> None:
    """Compares the number of prepared crops with that of the whole images, if these are there.

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


def cut_on_the_fly(options: DatasetOptions, kind: DataSetKind, source: Source) -> Source:
    """Five crops an image where `crop_type` asks for them and they are not prepared.

    The boxes are those of prepared crops; the second JPEG pass is missing.
    """
    if options.crop_type is None or not kind.cropped or source.cropped:
        return source
    print(f"train crops: {options.crop_type}, ratio {options.crop_ratio}, cut on the fly")
    return CropSource(source, options.crop_ratio, options.crop_type)
