"""The network and what trains it; `build_module` is the factory."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from model.backbone import BackboneSpec, FrozenViT
from model.checkpoint import Checkpoint, n_classes, read_checkpoint, restore
from model.criterion import register_loss
from model.evaluator import Refiner
from model.module import PPAPModule
from model.predictor import Predictor
from model.segmenter import Segmenter
from model.weights import build_backbone, load_backbone, register_backbone
from utils.config.loading import build_options, find_option_file, flatten, load_options
from utils.config.options import Options
from utils.errors import UserError
from utils.files import find_checkpoint
from utils.training.randomness import seeded
from utils.vision.labels import LabelSpace

__all__ = [
    "BackboneSpec",
    "FrozenViT",
    "PPAPModule",
    "Predictor",
    "build_module",
    "load_segmenter",
    "register_backbone",
    "register_loss",
]
READ_AFTER_TRAINING = (
    "model.",
    "eval.",
    "dataset.res",
    "dataset.val_res",
    "dataset.interpolation",
    "train.pre",
)


def build_module(
    options: Options,
    labels: LabelSpace,
    *,
    checkpoint: Checkpoint | None = None,
    train_labelled: bool | None = None,
    pictured: Collection[int] = (),
    refiner: Refiner | None = None,
) -> PPAPModule:
    """Builds the network and loads it, from a checkpoint or from the backbone's weights.

    Args:
        options: all options.
        labels: classes of the data set.
        checkpoint: where all parameters come from; None loads the backbone's weights only.
        train_labelled: whether train items have labels; None takes what the checkpoint says.
        pictured: see `PPAPModule`.
        refiner: see `PPAPModule`.

    Raises:
        UserError: weights or checkpoint are missing, damaged or do not fit.
    """
    with seeded(options.train.seed, "backbone"):
        backbone = build_backbone(options)
    check_channels(options, n_classes=labels.n_classes, dim=backbone.spec.dim)
    if train_labelled is None:
        train_labelled = checkpoint is None or checkpoint.about.get("train_labelled", True)
    if checkpoint is None:
        source = load_backbone(backbone, options.model.pretrained.pretrained_weights)
    else:
        source = str(checkpoint.path)
    with seeded(options.train.seed, "projection"):
        segmenter = Segmenter(backbone, compile=options.train.compile)
    module = PPAPModule(
        options, labels, segmenter, train_labelled=train_labelled, pictured=pictured, refiner=refiner
    )
    if checkpoint is not None:
        restore(module, checkpoint)
    print(f"backbone: {options.model.arch}, {backbone.spec.depth} blocks, from {source}")
    return module


def check_channels(options: Options, *, n_classes: int, dim: int) -> None:
    """Checks that the options agree with the backbone's width D.

    Raises:
        UserError: they differ, or `eval.is_direct` without one channel per cluster.
    """
    wanted, key = options.model.dim, "model.dim"
    if not options.model.continuous:
        wanted, key = n_classes, "model.continuous: false asks for D = n_classes, which"
    if wanted != dim:
        raise UserError(f"{key} is {wanted}, must be {dim}, the backbone's width")
    n_clusters = n_classes + options.model.extra_clusters
    if options.eval.is_direct and dim != n_clusters:
        raise UserError(
            f"eval.is_direct takes the {dim} channels of the code as cluster logits, so there must be {dim} "
            f"clusters, not {n_clusters}; set eval.is_direct false"
        )


def load_segmenter(
    checkpoint: str | Path,
    *,
    opt: str | Options | None = None,
    labels: LabelSpace | None = None,
    device: str | torch.device | None = None,
    res: int | None = None,
    head: str = "cluster",
    crf: bool | str = False,
    tile: int | None = None,
) -> Predictor:
    """Loads a trained network as a function from a photograph to its class map.

    Args:
        checkpoint: a file, a folder or a run below `output_dir`.
        opt: an option file, or options; None uses those in the checkpoint, which published ones do not have.
        labels: classes for a published checkpoint; ours contain them. None names them class 0, class 1, ...
        device, res, head, crf, tile: see `Predictor`.

    Raises:
        UserError: the checkpoint is missing, damaged or does not fit, or an argument is invalid.
    """
    if isinstance(opt, str):
        opt = load_options(find_option_file(opt))
    loaded = read_checkpoint(find_checkpoint(str(checkpoint), (opt or Options()).output_dir))
    options = _own_options(loaded) if opt is None else opt
    module = build_module(options, _own_labels(loaded) or labels or _numbered(loaded), checkpoint=loaded)
    assignment = loaded.about.get("assignment")
    return Predictor(module, assignment=assignment, device=device, res=res, head=head, crf=crf, tile=tile)


def _own_labels(loaded: Checkpoint) -> LabelSpace | None:
    """The classes that one of our checkpoints carries."""
    about = loaded.about
    return LabelSpace(tuple(about["class_names"]), tuple(map(tuple, about["palette"]))) if about else None


def _numbered(loaded: Checkpoint) -> LabelSpace:
    """As many classes as a checkpoint has, without names."""
    count = n_classes(loaded.state)
    return LabelSpace.with_spread_colours(tuple(f"class {index}" for index in range(count)))


def _own_options(loaded: Checkpoint) -> Options:
    """What a checkpoint was trained with, as far as it matters afterwards.

    Raises:
        UserError: it has no options, as a published one.
    """
    if "options" not in loaded.about:
        raise UserError(
            f"{loaded.path}: a published checkpoint carries no options; name its option file, as in "
            'load_segmenter(..., opt="cocostuff_eval.json")'
        )
    flat = flatten(loaded.about["options"])
    kept = {key: value for key, value in flat.items() if key.startswith(READ_AFTER_TRAINING)}
    return build_options(kept, source=f"the options in {loaded.path}")
