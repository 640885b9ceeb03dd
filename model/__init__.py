"""The network and its Lightning module; `build_module` is the factory."""

from pathlib import Path
from typing import Any

import torch

from model.backbone import Backbone, BackboneSpec, FrozenViT
from model.checkpoint import Checkpoint, open_checkpoint, stored_options
from model.methods import build_segmenter, register_method
from model.methods.base import Method, MethodOutput
from model.methods.ppap import register_loss
from model.module import PPAPModule
from model.predictor import Predictor
from model.segmenter import BlockSegmenter, BranchSegmenter, Segmenter
from model.weights import build_backbone, load_backbone, load_strictly, register_backbone
from utils.config.loading import build_options, find_option_file, load_options, with_changes
from utils.config.options import Options
from utils.config.plugins import load_plugins, report_changes
from utils.errors import UserError
from utils.training.randomness import seeded
from utils.vision.labels import LabelSpace


def build_module(
    options: Options,
    labels: LabelSpace,
    *,
    checkpoint: Checkpoint | None = None,
    train_labelled: bool | None = None,
    **evaluation: Any,
) -> PPAPModule:
    """Builds the network and loads it, from a checkpoint or from the backbone's weights.

    Args:
        options, labels: options of the run and classes of its data set.
        checkpoint: source of all parameters; None loads the backbone's weights only.
        train_labelled: whether train items have labels; None reads it from the checkpoint.
        evaluation: see `PPAPModule`.
    """
    with seeded(options.train.seed, "backbone"):
        backbone = build_backbone(options)
    code_dim = options.model.dim if options.model.continuous else labels.n_classes
    if train_labelled is None:
        train_labelled = checkpoint is None or checkpoint.about.get("train_labelled", True)
    weights = options.model.pretrained.pretrained_weights
    source = checkpoint.path if checkpoint else load_backbone(backbone, weights)
    with seeded(options.train.seed, "projection"):
        segmenter = build_segmenter(options, backbone, code_dim)
    _check_channels(options, n_classes=labels.n_classes, asked=code_dim, found=segmenter.code_dim)
    evaluation |= {"train_labelled": train_labelled, "weights": f"from {source}"}
    module = PPAPModule(options, labels, segmenter, **evaluation)
    if checkpoint is not None:
        _restore(module, checkpoint)
    return module


def _restore(module: PPAPModule, checkpoint: Checkpoint) -> None:
    """Loads all parameters; a UserError names both sides if classes, keys or shapes differ."""
    report_changes(checkpoint.about.get("plugins", {}), checkpoint.path)
    here, data = module.labels.names, module.options.dataset.data_type
    if (names := checkpoint.about.get("class_names", here)) != here:
        raise UserError(
            f"{checkpoint.path}: trained on the {len(names)} classes {', '.join(names)}; the data set of the "
            f"options ({data}) has the {len(here)} classes {', '.join(here)}; use the option file that the "
            "checkpoint was trained with"
        )
    load_strictly(module, checkpoint.state, str(checkpoint.path))


def _check_channels(options: Options, *, n_classes: int, asked: int, found: int) -> None:
    if asked != found:
        key = "model.dim" if options.model.continuous else "model.continuous is false: D = n_classes"
        raise UserError(f"{key} is {asked}, must be {found}, the backbone's width")
    if options.eval.is_direct and found != (clusters := n_classes + options.model.extra_clusters):
        channels = (
            f"eval.is_direct takes the {found} channels of the code as the logits of {clusters} clusters"
        )
        raise UserError(f"{channels}; the two must be equal, or set eval.is_direct false")


def load_segmenter(
    checkpoint: str | Path,
    *,
    opt: str | Path | Options | None = None,
    labels: LabelSpace | None = None,
    trust_plugins: bool = False,
    **arguments: Any,
) -> Predictor:
    """Loads a trained network as a function from a photograph to its class map.

    Args:
        checkpoint: a file, a folder or a run below `output_dir`.
        opt: an option file, such as options.json of a run, or options; None uses those stored in the
            checkpoint (published ones have none).
        labels: classes for a published checkpoint; ours contain them. None names them class 0, class 1, ...
        trust_plugins: whether to run the Python files that the checkpoint's options name.
        arguments: `device`, `res`, `head`, `crf` and `tile` of `Predictor`.
    """
    if isinstance(opt, (str, Path)):
        opt = load_options(find_option_file(str(opt)))
    loaded = open_checkpoint(str(checkpoint), (opt or Options()).output_dir)
    about = loaded.about
    if opt is None:
        flat = stored_options(loaded)
        load_plugins(flat, trusted=trust_plugins)
        opt = build_options(flat, source=f"the options in {loaded.path}")
    if about:
        labels = LabelSpace(about["class_names"], about["palette"])
    elif labels is None:
        count = loaded.state.get("linear_probe.classifier.bias", torch.zeros(1)).numel()
        labels = LabelSpace.with_spread_colours(tuple(f"class {index}" for index in range(count)))
    opt = with_changes(opt, {"train.compile": False})  # photographs of each size would be compiled anew
    module = build_module(opt, labels, checkpoint=loaded)
    return Predictor(module, assignment=about.get("assignment"), **arguments)
