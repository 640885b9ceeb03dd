"""Reads and exports checkpoints, in our format and in the published one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, JsonValue, ValidationError, ValidationInfo, model_validator
from torch import Tensor

from model.weights import checked_state
from utils.config.loading import flatten
from utils.config.options import OF_BLOCK, REMOVED_KEYS
from utils.errors import UserError
from utils.files import find_checkpoints
from utils.training.torch_files import read_torch_file, write_torch_file
from utils.vision.labels import IGNORE, LabelSpace

CHECKPOINT_ENTRY = "ppap"
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
Byte = Annotated[int, Field(ge=0, le=255)]


class _Entry(BaseModel, extra="allow"):
    """Keys of the `ppap` entry that are read; the rest is informational."""

    class_names: tuple[str, ...] = Field(min_length=1, max_length=IGNORE)
    palette: tuple[tuple[Byte, Byte, Byte], ...]
    assignment: list[int] | None  # class of each cluster
    options: dict[str, JsonValue]
    metrics: dict[str, float] = {}
    train_labelled: bool = True
    step: int | None = None
    epoch: int | None = None
    skipped_steps: int = 0
    plugins: dict[str, str] = {}

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> "_Entry":
        """Cross-field validation; the context is the state dict."""
        LabelSpace(self.class_names, self.palette)
        clusters = info.context.get("cluster_probe.clusters", torch.ones(0)).shape[:1].numel()
        if self.assignment is not None and len(self.assignment) != clusters:
            raise ValueError(f"assignment has {len(self.assignment)} entries for {clusters} clusters")
        return self


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read; `about` is our own entry, empty for the published format."""

    path: Path
    state: dict[str, Tensor]  # parameters under our names
    about: dict[str, Any]  # class names, palette, matching, options, ...


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads and validates a checkpoint of either format."""
    return parse_checkpoint(path, read_torch_file(path))


def open_checkpoint(name: str, output_dir: str) -> Checkpoint:
    """Reads the first intact one of `find_checkpoints`; the damaged ones before it are named."""
    *preferred, last = find_checkpoints(name, output_dir)
    for path in preferred:
        try:
            return read_checkpoint(path)
        except UserError as error:
            print(f"{error}; trying the next checkpoint")
    return read_checkpoint(last)


def parse_checkpoint(path: Path, content: Any) -> Checkpoint:
    """Validates the content of a checkpoint of either format; errors name the file and the entry."""
    keys = content.keys() if isinstance(content, dict) else set()
    if keys >= PUBLISHED.keys():
        return Checkpoint(path, _published_state(path, content), {})
    if not keys >= {CHECKPOINT_ENTRY, "state_dict"}:
        raise UserError(f"{path}: neither one of our checkpoints nor in the published format")
    state = checked_state(content["state_dict"], f"{path}: state_dict")
    try:
        entry = _Entry.model_validate(content[CHECKPOINT_ENTRY], context=state)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (CHECKPOINT_ENTRY, *first["loc"])))
        raise UserError(f"{path}: {where}: {first['msg']}; the checkpoint cannot be used") from None
    return Checkpoint(path, state, entry.model_dump(exclude_unset=True))


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


def _published_state(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """The published parameters under our names; unknown names are kept, so that loading reports them."""
    state = {}
    for part, prefixes in PUBLISHED.items():
        for name, value in checked_state(content[part], f"{path}: {part}").items():
            name = name.removeprefix("module.")  # of DataParallel
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
            state[prefixes.get(prefix, "") + name.removeprefix(prefix)] = value
    return state


def export(checkpoint: Checkpoint, path: Path) -> None:
    """Writes a checkpoint in the published format, such as <output_dir>/<name>/ckpt.pth."""
    if path.exists() and not path.is_file():
        raise UserError(f"--export is {path}: a folder or a device, must be a regular file or a new name")
    about, content = checkpoint.about, {}
    if (method := flatten(about.get("options", {})).get("method", "ppap")) not in OF_BLOCK:
        raise UserError(f"{checkpoint.path}: trained by method {method}; the published format is PPAP's")
    for part, prefixes in PUBLISHED.items():
        content[part] = {
            theirs + name.removeprefix(ours): value
            for theirs, ours in prefixes.items()
            for name, value in checkpoint.state.items()
            if name.startswith(ours)
        }
        content[part.replace("model", "optimizer")] = None  # as in the released files
    step, epoch, best = about.get("step"), about.get("epoch"), sum(about.get("metrics", {}).values())
    place = {"iter": step, "best_iter": step, "epoch": epoch, "best_epoch": epoch}
    write_torch_file(content | place | {"best": float(best)}, path)
