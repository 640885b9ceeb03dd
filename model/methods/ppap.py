"""PPAP, or a registered loss in its place, and the baseline that leaves the head as it is."""

import math
from typing import Any

from torch import nn

from loss import PPAPLoss
from model.criterion import build_criterion
from model.methods.base import Method, MethodOutput, Progress
from model.segmenter import BlockSegmenter, dropout_mask
from utils.config.options import Options
from utils.training.distributed import world_size
from utils.training.randomness import generator


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
        code, crit, z = segmenter(segmenter.tokens(batch.inputs), segmenter.grid(batch.label))
        found = self.criterion(z, crit * mask, **drawn)
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
