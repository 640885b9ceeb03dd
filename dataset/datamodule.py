"""The data module: opens the splits of a data set and builds their loaders."""

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from dataset.base import DataSetKind, FileSource, SegmentationDataset, Source, class_rule
from dataset.crops import CROPS, prepared_folder
from dataset.neighbours import FeatureEncoder, nearest_neighbours
from dataset.samplers import EvaluationBatchSampler, TrainBatchSampler, loader_workers, validation_batch_size
from dataset.token_cache import Encoder, TokenDataset, TokenLoader, cache_tokens
from dataset.verify import sound_items
from utils.config.options import DatasetOptions, Options
from utils.errors import UserError
from utils.training.distributed import own_slice
from utils.training.randomness import generator
from utils.training.stopping import worker_settings
from utils.vision.images import spread_indices
from utils.vision.transforms import Geometry


class SegmentationDataModule(LightningDataModule):
    """Train (unless `train` is false) and validation data, opened before any weights are loaded.

    Without validation images, a few train images, without labels, are used instead to show the clusters;
    `example_split` then holds all of them, otherwise it is the validation split. `train_labelled` and
    `validation_labelled` say whether there are labels for the linear probe and metrics, `damaged` has an
    error message per skipped item.
    """

    def __init__(self, options: Options, kind: DataSetKind, *, train: bool = True) -> None:
        super().__init__()
        chosen, workers = options.dataset, loader_workers(options)
        whole = kind.source(chosen, "train") if train else None
        examples = kind.source(chosen, "val")
        validates = len(examples) > 0
        if not validates:
            examples = kind.source(chosen, "train") if whole is None else whole
        items, crops = _train_items(whole, chosen, kind) if train else (None, None)
        kept, self.damaged = {}, []
        if chosen.check_files or chosen.skip_damaged:
            sources = ({"train": items} if train else {}) | {"val": examples}
            kept, self.damaged = sound_items(sources, skip=chosen.skip_damaged, workers=workers)
        self.options, self.labels = options, kind.labels(chosen)
        geometry = Geometry(chosen.val_res, "center", chosen.interpolation)
        split = SegmentationDataset(examples, geometry, kept=kept.get("val"))
        self.example_split = self.validation_set = split
        if not validates:
            shown = [split.kept[index] for index in spread_indices(options.eval.pictures, len(split))]
            self.validation_set = replace(split, kept=shown, hides_labels=True)
        self.validation_labelled = validates and len(split) > 0 and examples.labelled
        self.train_set, self.train_labelled = None, train and items.labelled
        self.neighbours: torch.Tensor | None = None
        if train:
            if workers < (wanted := options.dataloader.num_workers):
                print(f"dataloader.num_workers is {wanted}; using {workers}, one for each core")
            geometry = Geometry(chosen.res, chosen.loader_crop_type, chosen.interpolation)
            seed, batch = options.train.seed, options.dataloader.batch_size
            self.train_set = SegmentationDataset(items, geometry, seed, crops, kept.get("train"))
            if (count := len(self.train_set)) < batch:
                raise UserError(
                    f"dataloader.batch_size is {batch}, but there are only {count} train items, and the last "
                    "partial batch is dropped; lower the batch size or add images"
                )

    def with_tokens(
        self, encode: Encoder, *, backbone: Any, precision: str, device: torch.device
    ) -> "SegmentationDataModule":
        """The same data with cached tokens in place of images, as `dataset.cache_features` asks."""
        about = {"token_shape": backbone.token_shape, "device": device}
        about["model"] = f"{backbone.digest()} {precision}"
        found, items = copy.copy(self), self.validation_set
        found.train_set = cache_tokens(self.train_set, encode, self.options, split="train", **about)
        if len(items):
            found.validation_set = cache_tokens(items, encode, self.options, split="val", **about)
        return found

    def with_neighbours(
        self, encode: FeatureEncoder, *, backbone: Any, precision: str
    ) -> "SegmentationDataModule":
        """The same data with batches that hold a neighbour of each image, see `nearest_neighbours`."""
        model = f"{backbone.digest()} {precision}"
        found, items = copy.copy(self), self.train_set
        in_order = torch.arange(len(items)).split(validation_batch_size(self.options))
        loader = self._loader(items, [batch.tolist() for batch in in_order])
        found.neighbours = nearest_neighbours(items, loader, encode, self.options, model=model)
        return found

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The neighbours, so that a resumed run uses the same ones."""
        return {} if self.neighbours is None else {"neighbours": self.neighbours.int()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restores the neighbours, unless the run continues on other data."""
        if not self.options.resume_on_other_data:
            self.neighbours = state_dict["neighbours"].long()

    def inventory(self) -> dict[str, dict[str, int]]:
        """Size in bytes of each file of each split, by its name below the data folder."""
        used = {"train": self.train_set, "val": self.validation_set}
        root = self.options.dataset.data_path
        return {split: items.source.inventory(root) for split, items in used.items() if items is not None}

    def image_names(self, step: int) -> list[str]:
        """The images of a training step, from 1."""
        batches = self._train_batches(0)
        epoch, batch_idx = divmod(step - 1, len(batches))
        return [self.train_set.name(index) for index in batches.batches(epoch)[batch_idx]]

    def _train_batches(self, first_step: int) -> TrainBatchSampler:
        how = {"seed": self.options.train.seed, "first_step": first_step, "neighbours": self.neighbours}
        return TrainBatchSampler(len(self.train_set), self.options.dataloader.batch_size, **how)

    def train_dataloader(self) -> DataLoader:
        """The batches of an epoch; a resumed run starts with the step that follows the last trained one."""
        trained = self.trainer.global_step if self.trainer else 0
        return self._loader(self.train_set, self._train_batches(trained))

    def random_batches(self, images: int, step: int) -> DataLoader:
        """This rank's slices of batches of `images` random train images, a function of seed and step."""
        if images > (items := len(self.train_set)):
            raise UserError(
                f"hp.pool_size is {images}, but there are only {items} train items; set it to {items} or less"
            )
        order = torch.randperm(items, generator=generator(self.options.train.seed, "pool images", step))
        batches = order[:images].split(self.options.dataloader.batch_size)
        return self._loader(self.train_set, [own_slice(batch.tolist()) for batch in batches])

    def val_dataloader(self) -> DataLoader:
        """All validation images, in order, for the validations of training."""
        return self.evaluation_dataloader(validation_batch_size(self.options))

    def evaluation_dataloader(self, batch_size: int | None = None) -> DataLoader:
        """All validation images, in order, by default in batches of the final evaluation."""
        batches = EvaluationBatchSampler(len(self.validation_set), batch_size or self.options.eval.batch_size)
        return self._loader(self.validation_set, batches)

    def _loader(self, items: SegmentationDataset, batches: Sampler) -> DataLoader:
        cached = isinstance(items, TokenDataset)
        workers = 0 if cached and items.place != "disk" else loader_workers(self.options)
        how = {"batch_sampler": batches, "pin_memory": torch.cuda.is_available()}
        how |= {"persistent_workers": workers > 0, **worker_settings(workers)}
        return TokenLoader(items, **how) if cached else DataLoader(items, **how)


def _train_items(
    whole: Source, options: DatasetOptions, kind: DataSetKind
) -> tuple[Source, tuple[float, str] | None]:
    """Prepared crops if they exist, otherwise the whole images with ratio and kind of the crops to cut."""
    crop_type, ratio = options.crop_type, options.crop_ratio
    if crop_type is None or not kind.cropped:
        if crop_type is not None:
            print(f"dataset.crop_type is ignored: {options.data_type} has no crops, as published")
        return whole, None
    folder = prepared_folder(Path(options.data_path), options.data_type, crop_type, ratio)
    if not folder.is_dir():
        return whole, (ratio, crop_type)
    crops = prepared_crops(folder, kind.labels(options).n_classes, labelled=whole.labelled)
    if len(crops) != CROPS * len(whole) and not options.skip_damaged:
        raise UserError(
            f"{folder}: contains {len(crops):,} crops, must contain {CROPS * len(whole):,} (five per train "
            "image, with their labels); write the missing ones with dataset/crop_datasets.py, or, if images "
            "were added or removed, remove the folder: without it, crops are cut during training"
        )
    return crops, None


def prepared_crops(folder: Path, n_classes: int, *, labelled: bool = True) -> FileSource:
    """Crops stored as img/train/<5*index+k>.jpg and label/train/<5*index+k>.png (class + 1, 0 = ignore)."""
    images, labels = folder / "img/train", folder / "label/train"
    stems = _stems(images, ".jpg")
    if labelled:  # a crop without its label is missing
        stems &= _stems(labels, ".png")
    ordered = sorted(stems, key=int)
    targets = [f"{labels}/{stem}.png" if labelled else None for stem in ordered]
    rule = class_rule({class_id + 1: class_id for class_id in range(n_classes)}, ignored=[0])
    return FileSource([f"{images}/{stem}.jpg" for stem in ordered], targets, rule=rule)


def _stems(folder: Path, ending: str) -> set[str]:
    names = os.listdir(folder) if folder.is_dir() else ()
    return {stem for name in names if name.endswith(ending) and (stem := name.removesuffix(ending)).isdigit()}
