"""Builds the loss that the options select: PPAP's or a registered one."""

from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from loss import PPAPLoss
from utils.config.options import LOSSES, Options, register_name
from utils.errors import UserError

_registered: dict[str, Callable[[Options], Callable[..., Any]]] = {}


class OwnLoss(nn.Module):
    """Calls a registered loss, which may ignore the generator and may return a scalar."""

    def __init__(self, name: str, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.name, self.loss = name, loss
        known = signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters.values()
        self.drawn = any(each.name == "generator" or each.kind == each.VAR_KEYWORD for each in known)

    def forward(self, z: Tensor, features: Tensor, *, generator: torch.Generator) -> Any:
        """Loss and statistics; raises a UserError if the loss is not a differentiable scalar."""
        found = self.loss(z, features, **({"generator": generator} if self.drawn else {}))
        # without statistics of sets
        output = SimpleNamespace(loss=found, statistics=dict) if isinstance(found, Tensor) else found
        if not (hasattr(output, "statistics") and output.loss.ndim == 0 and output.loss.requires_grad):
            what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise UserError(
                f"training_coeff.loss is {self.name}, which returned {what}; must return a scalar tensor "
                "that depends on z, or a PPAPLossOutput"
            )
        return output


def register_loss(name: str, build: Callable[[Options], Callable[..., Any]]) -> None:
    """Makes your own loss available as `training_coeff.loss=<name>`.

    Args:
        name: must not be built in; registering a name again replaces it.
        build: takes all options, returns a function or module of z (N, D), the criterion features
            (B, D, h, w) and, if it has such a parameter, `generator`. It returns the loss, () with a
            gradient in z, or a `PPAPLossOutput`.
    """
    register_name(LOSSES, name)
    _registered[name] = build


def build_criterion(options: Options) -> nn.Module:
    """The loss that `training_coeff.*` describes."""
    chosen = options.training_coeff
    if chosen.loss in _registered:
        loss = _registered[chosen.loss](options)
        return loss if isinstance(loss, PPAPLoss) else OwnLoss(chosen.loss, loss)
    coefficients = chosen.model_dump(exclude={"loss"})
    return PPAPLoss(**coefficients | {"similarity_dtype": getattr(torch, chosen.similarity_dtype)})
