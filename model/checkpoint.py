"""Checkpoints: ours and the published format, loaded strictly; ours exported to the published one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.module import CHECKPOINT_ENTRY, PPAPModule
from model.weights import is_state, load_strictly
from utils.errors import UserError
from utils.training.torch_files import read_torch_file, write_torch_file

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
class Checkpoint:
    """A checkpoint as read.

    Attributes:
        path: its file.
        state: parameters under our names.
        about: class names, palette, matching, options and the rest of our own entry; empty for the published
            format.
    """

    path: Path
    state: dict[str, torch.Tensor]
    about: dict[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint of either format.

    Raises:
        UserError: damaged, or neither format.
    """
    content = read_torch_file(path, "checkpoint")
    if isinstance(content, dict):
        about, state = content.get(CHECKPOINT_ENTRY), content.get("state_dict")
        if isinstance(about, dict) and is_state(state):
            return Checkpoint(path, state, about)
        if all(is_state(content.get(part)) for part in ("net_model_state_dict", *PUBLISHED_PARTS)):
            return Checkpoint(path, published_state(content), {})
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


def export(checkpoint: Checkpoint, path: Path) -> None:
    """Writes a checkpoint in the published format, which the published evaluation code reads as well.

    Args:
        checkpoint: in either format.
        path: of the file to write, such as <output_dir>/<name>/ckpt.pth.

    Raises:
        UserError: it cannot be written.
    """

    def part(prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
        return {
            theirs + name.removeprefix(ours): value
            for theirs, ours in prefixes.items()
            for name, value in checkpoint.state.items()
            if name.startswith(ours)
        }

    about = checkpoint.about
    models = {"net_model_state_dict": part(PUBLISHED_NET)}
    models |= {name: part({"": ours}) for name, ours in PUBLISHED_PARTS.items()}
    optimizers = {
        name.replace("model", "optimizer"): None for name in models
    }  # None in the released files too
    counts = {
        "iter": about.get("step"),
        "best_iter": about.get("step"),
        "epoch": about.get("epoch"),
        "best_epoch": about.get("epoch"),
        "best": float(sum(about.get("metrics", {}).values())),
    }
    write_torch_file(models | optimizers | counts, path)


def describe_size(state: dict[str, torch.Tensor]) -> str | None:
    """The network that parameters under our names belong to, for an error message; None if incomplete."""
    blocks = {name.split(".")[3] for name in state if name.startswith("segmenter.backbone.blocks.")}
    try:
        width, _, patch, _ = state["segmenter.backbone.patch_embed.proj.weight"].shape
        classes, clusters = n_classes(state), len(state["cluster_probe.clusters"])
    except (KeyError, ValueError):
        return None
    return (
        f"a ViT of width {width}, patch {patch} and {len(blocks)} blocks with {classes} classes and "
        f"{clusters} clusters"
    )


def n_classes(state: dict[str, torch.Tensor]) -> int:
    """Number of classes of the linear probe."""
    return len(state["linear_probe.classifier.weight"])


def restore(module: PPAPModule, checkpoint: Checkpoint) -> None:
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
    found, wanted = describe_size(checkpoint.state), describe_size(module.state_dict())
    if found is not None and found != wanted:
        mistakes.append(f"it holds {found}; the options describe {wanted}")
    if mistakes:
        hint = "use the option file that the checkpoint was trained with"
        raise UserError([*mistakes, hint], f"{checkpoint.path}, which does not fit")
    load_strictly(module, checkpoint.state, str(checkpoint.path))
