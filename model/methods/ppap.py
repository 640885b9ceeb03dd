"""PPAP, or a registered loss in its place, and the baseline that leaves the head as it is."""

import math
from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from loss import PPAPLoss
from model.methods.base import Method, MethodOutput, Progress
from model.segmenter import BlockSegmenter, dropout_mask
from utils.config.options import LOSSES, Options, register_name
from utils.errors import UserError
from utils.training.distributed import world_size
from utils.training.randomness import generator

_registered: dict[str, Callable[[Options], Callable[..., Any]]] = {}


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


class OwnLoss(nn.Module):
    """Calls a registered loss, which may ignore the generator and may return a scalar."""

    def __init__(self, name: str, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.name, self.loss = name, loss
        called = loss.forward if isinstance(loss, nn.Module) else loss
        self.draws = "generator" in signature(called).parameters

    def forward(self, z: Tensor, features: Tensor, *, generator: torch.Generator) -> Any:
        """Loss and statistics; raises a UserError if the loss is not a differentiable scalar."""
        found = self.loss(z, features, **({"generator": generator} if self.draws else {}))
        output = SimpleNamespace(loss=found, statistics=dict) if isinstance(found, Tensor) else found
        if not (hasattr(output, "statistics") and output.loss.ndim == 0 and output.loss.requires_grad):
            what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise UserError(
                f"training_coeff.loss is {self.name}, which returned {what}; must return a scalar tensor "
                "that depends on z, or a PPAPLossOutput"
            )
        return output


class PPAP(Method):
    """Contrasts projections of the code by a loss of the criterion features, with channel dropout."""

    def __init__(self, options: Options, segmenter: BlockSegmenter) -> None:
        super().__init__(options, segmenter)
        self.criterion = build_criterion(options)

    def draws(self, images: int, grid: tuple[int, int], step: int, *, dim: int) -> dict[str, Any]:
        """The dropout mask and PPAP's anchors; other losses get a generator."""
        seed, share = self.options.train.seed, self.options.model.criterion_dropout
        dropout, anchors = (generator(seed, name, step) for name in ("criterion dropout", "anchors"))
        drawn = {"mask": dropout_mask((images, dim), probability=share, generator=dropout)}
        if not isinstance(self.criterion, PPAPLoss):
            return drawn | {"generator": anchors}
        patches = world_size() * images * math.prod(grid)
        return drawn | {"anchors": self.criterion.sample_anchors(patches, anchors)}

    def forward(
        self, segmenter: BlockSegmenter, batch: Any, draws: dict[str, Any], progress: Progress
    ) -> MethodOutput:
        """The loss is logged as `supcon_loss`, its published name."""
        mask, drawn = draws["mask"], {name: value for name, value in draws.items() if name != "mask"}
        tokens, grid = segmenter.tokens(batch.inputs), segmenter.grid(batch.label)
        code, crit = segmenter.code(tokens, grid), segmenter.features(tokens, grid)  # (B, D, h, w) each
        found = self.criterion(segmenter.project(code), crit * mask, **drawn)
        return MethodOutput(code, {"supcon_loss": found.loss}, found.statistics())


class Frozen(Method):
    """Trains the probes alone, on the code of PPAP's untrained head."""

    def forward(
        self, segmenter: BlockSegmenter, batch: Any, draws: dict[str, Any], progress: Progress
    ) -> MethodOutput:
        """No loss."""
        code = segmenter.code(segmenter.tokens(batch.inputs), segmenter.grid(batch.label))
        return MethodOutput(code, {}, {})

    def groups(self, segmenter: BlockSegmenter) -> list[tuple[list[nn.Parameter], Any]]:
        """None: the head stays as it is."""
        return []
