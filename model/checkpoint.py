"""Reads, restores and exports checkpoints, in our format and in the published one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.module import CHECKPOINT_ENTRY, PPAPModule
from model.weights import is_state, load_strictly
from utils.config.loading import flatten
from utils.config.options import REMOVED_KEYS
from utils.config.plugins import report_changes
from utils.errors import UserError
from utils.training.torch_files import read_torch_file, write_torch_file

PUBLISHED = {  # part of the published format -> published prefix of a parameter -> ours
    "net_model_state_dict": {
        "model.": "segmenter.backbone.",
        "decoder.": "segmenter.head.",
        "project_head.": "segmenter.projection.",
    },
    "linear_model_state_dict": {"": "linear_probe.classifier."},
    "cluster_model_state_dict": {"": "cluster_probe."},
}

OF_MACHINE = ("checkpoint", "gpu_ids", "output_dir", "resume", "trainer.", "wandb.id")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read; `about` is our own entry, empty for the published format."""

    path: Path
    state: dict[str, torch.Tensor]  # parameters under our names
    about: dict[str, Any]  # class names, palette, matching, options, ...


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint of either format."""
    content = read_torch_file(path, "checkpoint")
    if isinstance(content, dict):
        about, state = content.get(CHECKPOINT_ENTRY), content.get("state_dict")
        if isinstance(about, dict) and is_state(state):
            return Checkpoint(path, state, about)
        if all(is_state(content.get(part)) for part in PUBLISHED):
            return Checkpoint(path, _published_state(content), {})
    keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
    raise UserError(f"{path}: neither one of our checkpoints nor a published one (it contains: {keys})")


def stored_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """The flat options of the run that wrote a checkpoint, without those of its machine.

    Raises:
        UserError: a published checkpoint has no options.
    """
    if not checkpoint.about:
        hint = "name its option file with --opt, or in Python as load_segmenter(..., opt=)"
        raise UserError(f"{checkpoint.path}: a published checkpoint contains no options; {hint}")
    flat = flatten(checkpoint.about["options"])
    return {key: value for key, value in flat.items() if not key.startswith((*OF_MACHINE, *REMOVED_KEYS))}


def _published_state(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The published parameters under our names; unknown names are kept, so that loading reports them."""
    state = {}
    for part, prefixes in PUBLISHED.items():
        for name, value in content[part].items():
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
            state[prefixes.get(prefix, "") + name.removeprefix(prefix)] = value
    return state


def export(checkpoint: Checkpoint, path: Path) -> None:
    """Writes a checkpoint in the published format, such as <output_dir>/<name>/ckpt.pth."""
    about, content = checkpoint.about, {}
    for part, prefixes in PUBLISHED.items():
        content[part] = {
            theirs + name.removeprefix(ours): value
            for theirs, ours in prefixes.items()
            for name, value in checkpoint.state.items()
            if name.startswith(ours)
        }
        content[part.replace("model", "optimizer")] = None  # as in the released files
    for name, key in {"iter": "step", "best_iter": "step", "epoch": "epoch", "best_epoch": "epoch"}.items():
        content[name] = about.get(key)
    write_torch_file(content | {"best": float(sum(about.get("metrics", {}).values()))}, path)


def n_classes(state: dict[str, torch.Tensor]) -> int:
    """Number of classes of the linear probe."""
    return len(state["linear_probe.classifier.weight"])


def restore(module: PPAPModule, checkpoint: Checkpoint) -> None:
    """Loads all parameters, strictly; a UserError names both sides if classes, keys or shapes differ."""
    report_changes(checkpoint.about.get("plugins", {}), checkpoint.path)
    names, labels = checkpoint.about.get("class_names"), module.labels
    if names is not None and tuple(names) != labels.names:
        raise UserError(
            f"{checkpoint.path}: trained on the {len(names)} classes {', '.join(names)}; the data set of the "
            f"options ({module.options.dataset.data_type}) has the {labels.n_classes} classes "
            f"{', '.join(labels.names)}; use the option file that the checkpoint was trained with"
        )
    load_strictly(module, checkpoint.state, str(checkpoint.path))
