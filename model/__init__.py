"""The network and what trains it; `build_module` is the factory."""

from __future__ import annotations

from model.backbone import BackboneSpec, FrozenViT
from model.checkpoint import CheckpointFile, read_checkpoint, restore
from model.criterion import register_loss
from model.module import PPAPModule, check_channels
from model.pretrained import build_backbone, load_backbone, register_backbone
from model.segmenter import Segmenter
from utils.files import find_checkpoint
from utils.labels import LabelSpace
from utils.options import Options
from utils.randomness import seeded

__all__ = ["BackboneSpec", "FrozenViT", "PPAPModule", "build_module", "register_backbone", "register_loss"]


def build_module(
    options: Options, labels: LabelSpace, *, train_labelled: bool | None = None, checkpoint: str | None = None
) -> PPAPModule:
    """Builds the network and fills it, from a checkpoint or from the backbone's weights.

    Args:
        options: all options.
        labels: classes of the data set.
        train_labelled: whether train items have labels; None: as the checkpoint says.
        checkpoint: a file, a folder or a run to restore all parameters from.

    Raises:
        UserError: weights or checkpoint are missing, damaged or do not fit.
    """
    with seeded(options.train.seed, "backbone"):
        backbone = build_backbone(options)
    check_channels(options, n_classes=labels.n_classes, dim=backbone.spec.dim)
    loaded: CheckpointFile | None = None
    if checkpoint is not None:
        loaded = read_checkpoint(find_checkpoint(checkpoint, options.output_dir))
    if train_labelled is None:
        train_labelled = loaded is None or loaded.about.get("train_labelled", True)
    source = (
        str(loaded.path) if loaded else load_backbone(backbone, options.model.pretrained.pretrained_weights)
    )
    with seeded(options.train.seed, "projection"):
        segmenter = Segmenter(backbone)
    module = PPAPModule(options, labels, segmenter, train_labelled=train_labelled)
    if loaded is not None:
        restore(module, loaded)
        module.restored_from, module.restored_step = str(loaded.path), loaded.about.get("step")
    print(f"backbone: {options.model.arch}, {backbone.spec.depth} blocks, from {source}")
    return module
