"""Which backbone the options mean, and where its weights come from."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.backbone import BackboneSpec, FrozenViT
from model.official import NATIVE_RES, official_backbone, official_file
from utils.config.options import ARCHS, FULL_DEPTH, WIDTH_AND_HEADS, Options
from utils.errors import UserError, first_line
from utils.files import weights_file

_numpy_scalar = np.float64(0).__reduce__()[0]
NUMPY_SCALARS = [  # under the names that NumPy 1 and NumPy 2 write
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
]
_registered: dict[str, Callable[[Options], FrozenViT]] = {}
DROPPED = ("head.", "mask_token", "dino_head.", "ibot_head.")


def register_backbone(name: str, build: Callable[[Options], FrozenViT]) -> None:
    """Makes a backbone of your own known as `model.arch=<name>`.

    Args:
        name: not yet taken.
        build: from all options to a `FrozenViT`, or what has its methods; `pretrained_weights` are loaded
            into it afterwards, where they are named.

    Raises:
        ValueError: the name is taken.
    """
    if name in ARCHS:
        raise ValueError(f"backbone {name} is there already; take another name")
    _registered[name] = build
    ARCHS.append(name)


def build_backbone(options: Options) -> FrozenViT:
    """The backbone that `model.*` of the options describes, not yet filled."""
    if options.model.arch in _registered:
        return _registered[options.model.arch](options)
    return FrozenViT(backbone_spec(options))


def backbone_spec(options: Options) -> BackboneSpec:
    """The dimensions that `model.*` of the options describes."""
    arch, chosen = options.model.arch, options.model.pretrained
    depth = chosen.depth or FULL_DEPTH[arch]
    if arch == "vit":
        native = chosen.native_res or options.dataset.res
        return BackboneSpec(options.model.dim, depth, chosen.heads, chosen.dino_patch_size, native)
    dim, heads = WIDTH_AND_HEADS[chosen.model_type]
    return BackboneSpec(
        dim=dim,
        depth=depth,
        heads=heads,
        patch=chosen.dino_patch_size,
        native_res=NATIVE_RES[arch],
        registers=4 if chosen.registers else 0,
        layer_scale=arch == "dinov2",
        official=official_backbone(
            arch, chosen.model_type, chosen.dino_patch_size, registers=chosen.registers
        ),
    )


def load_backbone(backbone: FrozenViT, weights: str | None) -> str:
    """Fills a backbone from a local file or from the official address.

    Args:
        backbone: as built from `backbone_spec`.
        weights: `model.pretrained.pretrained_weights`.

    Returns:
        What was loaded, for the log.

    Raises:
        UserError: no file and no network, a damaged file, or keys and shapes that do not fit.
    """
    if weights is None and backbone.spec.official is None:
        return "no weights (the backbone is untrained)"
    path = weights_file(weights) if weights is not None else official_file(backbone.spec.official)
    load_strictly(backbone, clean_state(read_state(path), backbone.spec.depth), str(path))
    return str(path)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pth or .safetensors file: bare, or under `teacher`."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # the format's own errors have no common base
            raise unreadable(path, "weights file", error) from None
    state = read_tensors(path, "weights file")
    state = state.get("teacher", state) if isinstance(state, dict) else state
    if not is_state(state):
        raise UserError(
            f"{path}: must hold a state dict, bare or under 'teacher', holds {type(state).__name__}"
        )
    return state


def read_tensors(path: Path, kind: str) -> Any:
    """torch.load of tensors, plain containers and NumPy scalars alone; no code in a file is run.

    Args:
        path: the file.
        kind: what to call it in an error.

    Raises:
        UserError: damaged, or more than that is in it.
    """
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):  # published files may hold a metric as one
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises almost anything
        raise unreadable(path, kind, error) from None


def unreadable(path: Path, kind: str, error: Exception) -> UserError:
    """The error for a file that cannot be read, in our words where torch advises unsafe loading."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, pickle.UnpicklingError):
        reason = "damaged, or it holds more than tensors and plain containers"
    return UserError(f"{path}: not a readable {kind} ({reason}); fetch or write it again")


def is_state(state: Any) -> bool:
    """Whether something is a dict from names to tensors."""
    return isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    )


def clean_state(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Official names as ours: prefixes, block chunks and heads dropped, and blocks beyond `depth`."""
    clean = {}
    for name, value in state.items():
        name = re.sub(r"^(module\.|backbone\.)+", "", name)
        name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)  # DINOv2's training keeps chunks
        block = re.match(r"blocks\.(\d+)\.", name)
        if name.startswith(DROPPED) or (block and int(block[1]) >= depth):
            continue
        clean[name] = value
    return clean


def load_strictly(module: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    """load_state_dict(strict=True) whose error names file, keys and both shapes.

    Raises:
        UserError: missing or unknown keys, or shapes that differ.
    """
    own = module.state_dict()
    mistakes = [f"{name}: missing in the file" for name in own if name not in state]
    mistakes += [
        f"{name}: not part of the model that the options describe" for name in state if name not in own
    ]
    mistakes += [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    mistakes += [
        f"{name}: {state[name].dtype} in the file, {value.dtype} in the model"
        for name, value in own.items()
        if name in state and state[name].is_complex() != value.is_complex()
    ]
    if mistakes:
        more = [f"... and {len(mistakes) - 8} more"] if len(mistakes) > 8 else []
        hint = "compare model.* and the data set of the options with what the file was made for"
        raise UserError([*mistakes[:8], *more, hint], f"{source}, which does not fit")
    try:
        module.load_state_dict(state)
    except (RuntimeError, NotImplementedError) as error:  # sparse or quantized tensors
        raise UserError(f"{source}: holds tensors that cannot be copied ({first_line(error)})") from None
