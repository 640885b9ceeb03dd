"""Builds the loss that the options select: PPAP's or a registered one."""

from collections.abc import Callable

import torch
from torch import nn

from loss import PPAPLoss
from utils.config.options import LOSSES, Options

COEFFICIENTS = (
    *("initialcrit_pos", "initialcrit_amb", "prop_iter", "sigma_pos", "sigma_amb"),
    *("trainpatchsplit", "tau", "group_size", "chunk_size"),
)
_registered: dict[str, Callable[[Options], nn.Module]] = {}


def register_loss(name: str, build: Callable[[Options], nn.Module]) -> None:
    """Makes your own loss available as `training_coeff.loss=<name>`.

    Args:
        name: an unused name.
        build: takes all options, returns a module that is called like `PPAPLoss`: with z (N, D), the
            criterion features (B, D, h, w) and `generator`, returning a `PPAPLossOutput`.
    """
    if name in LOSSES:
        raise ValueError(f"loss {name} already exists; choose another name")
    _registered[name] = build
    LOSSES.append(name)


def build_criterion(options: Options) -> nn.Module:
    """The loss that `training_coeff.*` describes."""
    chosen = options.training_coeff
    if chosen.loss in _registered:
        return _registered[chosen.loss](options)
    coefficients = {name: getattr(chosen, name) for name in COEFFICIENTS}
    return PPAPLoss(**coefficients, similarity_dtype=getattr(torch, chosen.similarity_dtype))
