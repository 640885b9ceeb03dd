"""What a training method is: its draws, its losses and its own state."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from model.segmenter import Segmenter
from utils.config.options import Options


class MethodOutput(NamedTuple):
    """Output of a training step."""

    code: Tensor  # (B, K, h, w) of the batch's own images, for the probes
    losses: dict[str, Tensor]  # () each; their sum is minimised
    statistics: dict[str, Tensor]  # () each, logged


class Progress(NamedTuple):
    """Position in a run."""

    step: int  # from 1
    total: int  # steps of the whole run


class Method(nn.Module):
    """Trains a segmenter without labels.

    Its parameters and buffers are part of a checkpoint; what `__init__` draws depends on `train.seed`. With
    several processes, losses are those of the whole batch, see `utils.training.distributed`. It gets the
    segmenter with each call: as a submodule, the segmenter's parameters would be stored twice.
    """

    neighbours = 0  # nearest train images to draw one from; if any, a batch is B images, then B neighbours

    def __init__(self, options: Options, segmenter: Segmenter) -> None:
        super().__init__()
        self.options = options

    def images(self, batch: Any) -> int:
        """B, the images of a batch without their neighbours."""
        return len(batch.label) // (2 if self.neighbours else 1)

    def draws(self, images: int, grid: tuple[int, int], step: int, *, dim: int) -> dict[str, Any]:
        """The random draws of a step, on the CPU; the module moves the tensors to the device.

        Args:
            images: B, this rank's images.
            grid: (h, w).
            step: from 1.
            dim: D, channels of the frozen features.
        """
        return {}

    def forward(
        self, segmenter: Segmenter, batch: Any, draws: dict[str, Any], progress: Progress
    ) -> MethodOutput:
        """Code and losses of a `Batch` of images or cached tokens."""
        raise NotImplementedError

    def groups(self, segmenter: Segmenter) -> list[tuple[list[nn.Parameter], Any]]:
        """Parameter groups of the optimizer, each with its section of `optimizer.*`; the probes' follow.

        By default the segmenter's, and the method's own if it has any that require a gradient.
        """
        own = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [(part, self.options.optimizer.net) for part in (segmenter.trainable(), own) if part]

    def reference_images(self, step: int, batch_idx: int) -> int:
        """Number of train images that `prepare` needs before a step, from 1, `batch_idx` in its epoch."""
        return 0

    def prepare(self, segmenter: Segmenter, batches: Iterable[Any], step: int) -> None:
        """Updates state computed from random train images, see HP; the batches are on the device."""
