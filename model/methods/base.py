"""The interface of a method: what is trained, with which losses and which state."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from model.segmenter import Segmenter


class MethodOutput(NamedTuple):
    """Output of a training step for a batch of images."""

    code: Tensor  # (B, K, h, w), for the probes
    losses: dict[str, Tensor]  # by name, () each
    statistics: dict[str, Tensor]  # logged, () each


class Progress(NamedTuple):
    """Where training is."""

    step: int  # from 1
    total: int


class Method(nn.Module):
    """The training side of a method; its parameters and buffers are in the checkpoint."""

    needs_images = False  # whether cached tokens do not suffice

    def draws(self, images: int, grid: tuple[int, int], step: int) -> dict[str, Any]:
        """All that a step draws on the CPU for this rank's images."""
        return {}

    def groups(self, segmenter: Segmenter) -> list[tuple[list[nn.Parameter], Any]]:
        """Trained parameters and their optimizer options."""
        raise NotImplementedError

    def pools_due(self, step: int, batch_idx: int) -> bool:
        """Whether `prepare` is to be called before a step, from 1, that is `batch_idx` in its epoch."""
        return False

    def prepare(self, segmenter: Segmenter, batches: Iterable[Any], step: int) -> None:
        """Renews the state that is computed from random train images."""
