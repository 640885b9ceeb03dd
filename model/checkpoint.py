"""Checkpoints: our own and the published format, read strictly; ours written in the published one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.module import CHECKPOINT_ENTRY, PPAPModule
from model.weights import is_state, load_strictly
from utils.errors import UserError, first_line
from utils.files import replacing
from utils.training.torch_files import read_torch_file

PUBLISHED_PARTS = {  # published dict entry -> our prefix
    "linear_model_state_dict": "linear_probe.classifier.",
    "cluster_model_state_dict": "cluster_probe.",
}
PUBLISHED_NET = {
    "model.": "segmenter.backbone.",
    "decoder.": "segmenter.head.",
    "project_head.": "segmenter.projection.",
}


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint as read.

    Attributes:
        path: where it lies.
        state: parameters under our names.
        about: class names, palette, matching and the rest of our own entry; empty for the published format.
    """

    path: Path
    state: dict[str, torch.Tensor]
    about: dict[str, Any]


def read_checkpoint(path: Path) -> CheckpointFile:
    """Reads tensors and plain containers only (weights_only), whichever of the two formats it is.

    Raises:
        UserError: damaged, or neither format.
    """
    content = read_torch_file(path, "checkpoint")
    if isinstance(content, dict) and isinstance(content.get(CHECKPOINT_ENTRY), dict):
        loaded = CheckpointFile(path, content.get("state_dict"), content[CHECKPOINT_ENTRY])
        if is_state(loaded.state) and _has_names(loaded.about):
            return loaded
    elif isinstance(content, dict) and all(
        is_state(content.get(part)) for part in ("net_model_state_dict", *PUBLISHED_PARTS)
    ):
        return CheckpointFile(path, published_state(content), {})
    keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
    raise UserError(f"{path}: neither one of our checkpoints nor a published one (it holds: {keys})")


def _has_names(about: dict[str, Any]) -> bool:
    """Whether the class names are a sequence of strings, or not there."""
    names = about.get("class_names", ())
    return isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)


def published_state(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The published format's parameters under our names."""
    state = {}
    for name, value in content["net_model_state_dict"].items():
        prefix = next((prefix for prefix in PUBLISHED_NET if name.startswith(prefix)), "")
        state[PUBLISHED_NET.get(prefix, "") + name.removeprefix(prefix)] = value
    for part, prefix in PUBLISHED_PARTS.items():
        state |= {prefix + name: value for name, value in content[part].items()}
    return state


def export(checkpoint: CheckpointFile, path: Path) -> None:
    """Writes a checkpoint in the published format, which the published evaluation reads as well.

    Args:
        checkpoint: in either format.
        path: of the file to write, such as <output_dir>/<name>/ckpt.pth.

    Raises:
        UserError: it cannot be written.
    """
    net = {
        theirs + name.removeprefix(ours): value
        for theirs, ours in PUBLISHED_NET.items()
        for name, value in checkpoint.state.items()
        if name.startswith(ours)
    }
    parts = {
        part: {name.removeprefix(ours): v for name, v in checkpoint.state.items() if name.startswith(ours)}
        for part, ours in PUBLISHED_PARTS.items()
    }
    about = checkpoint.about
    step, best = about.get("step"), float(sum(about.get("metrics", {}).values()))
    counts = dict.fromkeys(("iter", "best_iter"), step) | dict.fromkeys(
        ("epoch", "best_epoch"), about.get("epoch")
    )
    parts |= {"net_model_state_dict": net}
    optimizers = dict.fromkeys(
        (part.replace("model", "optimizer") for part in parts), None
    )  # as in the released files
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save(counts | parts | optimizers | {"best": best}, temporary)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        raise UserError(f"{path}: cannot be written ({first_line(error)}); choose another place") from None


@dataclass(frozen=True)
class Size:
    """What tells one network from another."""

    width: int
    patch: int
    blocks: int
    classes: int
    clusters: int

    def __str__(self) -> str:
        return (
            f"a ViT of width {self.width}, patch {self.patch} and {self.blocks} blocks with {self.classes} "
            f"classes and {self.clusters} clusters"
        )


def size_of(state: dict[str, torch.Tensor]) -> Size | None:
    """The size of the network that parameters under our names belong to; None where they belong to none."""
    blocks = {name.split(".")[3] for name in state if name.startswith("segmenter.backbone.blocks.")}
    try:
        width, _, patch, _ = state["segmenter.backbone.patch_embed.proj.weight"].shape
        classes = len(state["linear_probe.classifier.weight"])
        return Size(width, patch, len(blocks), classes, len(state["cluster_probe.clusters"]))
    except (KeyError, ValueError, TypeError):
        return None


def restore(module: PPAPModule, checkpoint: CheckpointFile) -> None:
    """Loads all parameters, strictly.

    Raises:
        UserError: data set, classes, keys or shapes differ; names both sides.
    """
    mistakes = []
    names = checkpoint.about.get("class_names")
    if names is not None and tuple(names) != module.labels.names:
        mistakes.append(
            f"it was trained on the {len(names)} classes {', '.join(names)}; the data set of the options "
            f"({module.options.dataset.data_type}) has the {module.labels.n_classes} classes "
            f"{', '.join(module.labels.names)}"
        )
    found, wanted = size_of(checkpoint.state), size_of(module.state_dict())
    if found is not None and found != wanted:
        mistakes.append(f"it holds {found}; the options describe {wanted}")
    if mistakes:
        hint = "take the option file that the checkpoint was trained with"
        raise UserError([*mistakes, hint], f"{checkpoint.path}, which does not fit")
    load_strictly(module, checkpoint.state, str(checkpoint.path))
