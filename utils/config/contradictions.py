"""What single options cannot tell: keys that contradict each other, and files that are not there."""

from __future__ import annotations

import errno
import json
import os

from utils.config.options import FULL_DEPTH, PATCHES, WIDTH_AND_HEADS, WITHOUT_FOLDER, Options
from utils.config.wandb_options import wandb_mistakes
from utils.errors import UserError
from utils.files import find_checkpoint, weights_file
from utils.training.launch import planned_world_size
from utils.training.schedule import checkpoint_interval


def contradictions(options: Options) -> list[str]:
    """Mistakes that only several keys together make."""
    found = []
    patch = options.model.pretrained.dino_patch_size
    for key in ("res", "val_res"):
        value = getattr(options.dataset, key)
        if value % patch:
            low, high = value // patch * patch, (value // patch + 1) * patch
            nearest = f"{low} or {high}" if low else str(high)
            found.append(f"dataset.{key} is {value}, must be a multiple of the patch ({patch}): {nearest}")
    if options.eval.extra_clusters != options.model.extra_clusters:
        found.append(
            f"eval.extra_clusters is {options.eval.extra_clusters}, must equal model.extra_clusters "
            f"({options.model.extra_clusters})"
        )
    if options.dataset.cache_features and options.dataset.loader_crop_type == "random":
        found.append(
            f"dataset.cache_features is {options.dataset.cache_features}, must be null with "
            "dataset.loader_crop_type random, whose images differ each epoch"
        )
    batch, parts = options.dataloader.batch_size, planned_world_size(options.trainer)
    if batch % parts:
        low, high = batch // parts * parts, (batch // parts + 1) * parts
        found.append(
            f"dataloader.batch_size is {batch}, the images of a step on all devices together, must be a "
            f"multiple of trainer.devices x trainer.num_nodes ({parts}): {f'{low} or ' if low else ''}{high}"
        )
    try:
        checkpoint_interval(options.train.checkpoint_every)
    except ValueError as error:
        found.append(f"train.checkpoint_every is {json.dumps(options.train.checkpoint_every)}, {error}")
    return found + wandb_mistakes(options.wandb) + _backbone_contradictions(options)


def _backbone_contradictions(options: Options) -> list[str]:
    model, backbone = options.model, options.model.pretrained
    patches, full = PATCHES.get(model.arch), FULL_DEPTH.get(model.arch)
    found = []
    if patches and backbone.dino_patch_size not in patches:
        allowed = " or ".join(map(str, patches))
        found.append(
            f"model.pretrained.dino_patch_size is {backbone.dino_patch_size}, "
            f"must be {allowed} with model.arch {model.arch}"
        )
    if patches and (backbone.depth or full) > full:
        found.append(f"model.pretrained.depth is {backbone.depth}, must be at most {full} with {model.arch}")
    if backbone.registers and model.arch != "dinov2":
        found.append(f"model.pretrained.registers is true, must be false with model.arch {model.arch}")
    width, _ = WIDTH_AND_HEADS[backbone.model_type]
    if patches and model.continuous and model.dim != width:
        found.append(
            f"model.dim is {model.dim}, must be {width}, the width of {backbone.model_type} "
            "(the head is a copy of its last block)"
        )
    if model.arch == "vit":
        if model.dim % backbone.heads:
            found.append(f"model.dim is {model.dim}, must be a multiple of heads ({backbone.heads})")
        if (backbone.native_res or 0) % backbone.dino_patch_size:
            patch = backbone.dino_patch_size
            found.append(
                f"model.pretrained.native_res is {backbone.native_res}, must be a multiple of {patch}"
            )
    return found


def missing_files(options: Options) -> list[str]:
    """Files that the options name and that are not there, and a data set without a folder."""
    found = []
    weights = options.model.pretrained.pretrained_weights
    if weights is not None and not os.path.isfile(weights_file(weights)):
        found.append(
            f"model.pretrained.pretrained_weights is {weights}: no such file; null takes the official"
        )
    if options.checkpoint:
        try:
            find_checkpoint(options.checkpoint, options.output_dir)
        except UserError as error:
            found.append(str(error))
    kind, folder = options.dataset.data_type, options.dataset.data_path
    if kind not in WITHOUT_FOLDER and not folder:  # its data set looks into a folder
        found.append(f"dataset.data_path is not set: name the folder of the {kind} data with --data_path")
    elif kind not in WITHOUT_FOLDER and _cannot_be(folder):
        found.append(f"dataset.data_path is {json.dumps(folder)}: no folder can be called so")
    return found


def _cannot_be(path: str) -> bool:
    """Whether the system itself refuses a path."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    except ValueError:  # a NUL in it
        return True
    return False
