"""STEGO: distils the correspondences of frozen features between an image, its neighbours and random images.

Hamilton, Zhang, Hariharan, Snavely, Freeman, "Unsupervised Semantic Segmentation by Distilling Feature
Correspondences", ICLR 2022; the loss is in loss/correspondence.py, the neighbours in dataset/neighbours.py.
"""

from typing import Any

import torch

from loss.correspondence import correspondence_loss, draw_pairs
from model.methods.base import Method, MethodOutput, Progress
from model.segmenter import Segmenter, dropout_mask
from utils.config.options import Options
from utils.training.distributed import world_size
from utils.training.randomness import generator


class STEGO(Method):
    """The correspondence loss, with channel dropout of features and head. It has no state."""

    def __init__(self, options: Options, segmenter: Segmenter) -> None:
        super().__init__(options, segmenter)
        self.chosen, self.neighbours = options.stego, options.stego.num_neighbors

    def draws(self, images: int, grid: tuple[int, int], step: int, *, dim: int) -> dict[str, Any]:
        """Dropout masks of images and neighbours, the points of the whole batch, and random partners."""
        seed, found = self.options.train.seed, {}
        share, drawn = self.options.model.criterion_dropout, generator(seed, "dropout", step)
        how = {"probability": share, "generator": drawn}
        for name in ("linear", "nonlinear", "features"):
            found[name] = torch.cat([dropout_mask((images, dim), **how) for _ in range(2)])  # (2B, D, 1, 1)
        sizes = {"samples": self.chosen.feature_samples, "negatives": self.chosen.neg_samples}
        points = generator(seed, "points", step)
        pairs = draw_pairs(world_size() * images, **sizes, generator=points)
        return found | dict(zip(("coords1", "coords2", "perms"), pairs, strict=True))

    def forward(
        self, segmenter: Segmenter, batch: Any, draws: dict[str, Any], progress: Progress
    ) -> MethodOutput:
        """The code with dropout of the images, and the loss; the parts of the loss are logged."""
        grid, images, chosen = segmenter.grid(batch.label), self.images(batch), self.chosen
        features = segmenter.features(segmenter.tokens(batch.inputs), grid)  # (2B, D, h, w)
        code = segmenter.head(features, (draws["linear"], draws["nonlinear"]))  # (2B, K, h, w)
        feat, feat_pos = (features * draws["features"]).split(images)  # (B, D, h, w) each
        own, code_pos = code.split(images)  # (B, K, h, w) each
        found = correspondence_loss(
            feat,
            feat_pos,
            own,
            code_pos,
            coords1=draws["coords1"],
            coords2=draws["coords2"],
            perms=draws["perms"],
            weights={"self": chosen.weight_self, "knn": chosen.weight_knn, "rand": chosen.weight_rand},
            shifts={"self": chosen.shift_self, "knn": chosen.shift_knn, "rand": chosen.shift_rand},
            pointwise=chosen.pointwise,
            zero_clamp=chosen.zero_clamp,
            stabilize=chosen.stabilize,
        )
        parts = {name: value.detach() for name, value in found._asdict().items() if name != "total"}
        return MethodOutput(own, {"stego_loss": found.total}, parts)
