"""Reading checkpoints: our own and the published format, strictly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.module import CHECKPOINT_ENTRY, PPAPModule
from model.pretrained import is_state, load_strictly, read_tensors
from utils.errors import UserError

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
    content = read_tensors(path, "checkpoint")
    if isinstance(content, dict) and isinstance(content.get(CHECKPOINT_ENTRY), dict):
        loaded = CheckpointFile(path, content.get("state_dict"), content[CHECKPOINT_ENTRY])
        if is_state(loaded.state):
            return loaded
    elif isinstance(content, dict) and all(
        is_state(content.get(part)) for part in ("net_model_state_dict", *PUBLISHED_PARTS)
    ):
        return CheckpointFile(path, published_state(content), {})
    keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
    raise UserError(f"{path}: neither one of our checkpoints nor a published one (it holds: {keys})")


def published_state(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The published format's parameters under our names."""
    state = {}
    for name, value in content["net_model_state_dict"].items():
        prefix = next((prefix for prefix in PUBLISHED_NET if name.startswith(prefix)), "")
        state[PUBLISHED_NET.get(prefix, "") + name.removeprefix(prefix)] = value
    for part, prefix in PUBLISHED_PARTS.items():
        state |= {prefix + name: value for name, value in content[part].items()}
    return state


def restore(module: PPAPModule, checkpoint: CheckpointFile) -> None:
    """Loads all parameters, strictly.

    Raises:
        UserError: classes, keys or shapes differ; names both sides.
    """
    names = checkpoint.about.get("class_names")
    if names is not None and tuple(names) != module.labels.names:
        raise UserError(
            f"{checkpoint.path}: trained on the {len(names)} classes {', '.join(names)}; the data set "
            f"of the options has the {module.labels.n_classes} classes {', '.join(module.labels.names)}"
        )
    load_strictly(module, checkpoint.state, str(checkpoint.path))
