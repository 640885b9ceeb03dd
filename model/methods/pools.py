"""HP's reference pools: features and codes of random patches, whose similarities set the thresholds."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.segmenter import Segmenter, dropout_mask
from utils.training.device import upload
from utils.training.distributed import all_gather, own_slice, world_size


class ReferencePools(nn.Module):
    """Unit-length rows, float16: `agnostic` (M, D) of the frozen features, `specific` (M, K) of the code.

    Buffers, so that a resumed run compares with the same rows.
    """

    def __init__(self, size: int, dim: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("agnostic", torch.zeros(size, dim, dtype=torch.float16))
        self.register_buffer("specific", torch.zeros(size, channels, dtype=torch.float16))

    @torch.no_grad()
    def renew(
        self,
        segmenter: Segmenter,
        average: nn.Module,
        batches: Iterable[Any],
        generator: torch.Generator,
        *,
        dropout: float,
        both: bool,
    ) -> None:
        """Fills the specific pool, or both, with one random patch of each image.

        The two pools take different patches of an image. Every rank passes its slices of the same batches and
        ends with the same pools.

        Args:
            average: the averaged head, which computes the code.
            batches: on the device, M images over all ranks.
            generator: on the CPU, in the same state on all ranks.
            dropout: probability of channel dropout of features and code.
        """

        def mask(values: Tensor) -> Tensor:
            drawn = dropout_mask(values.shape[:2], probability=dropout, generator=generator)
            return upload(drawn, values.device)

        agnostic, specific = [], []
        for batch in batches:
            grid = segmenter.grid(batch.label)
            features = segmenter.features(segmenter.tokens(batch.inputs), grid)  # (B, D, h, w)
            masks = [mask(features) for _ in range(3)]
            patch = _random_patch(features, generator)  # (B, D, 1, 1)
            agnostic.append(all_gather(unit_rows(patch * masks[0])))
            code = average(_random_patch(features, generator), masks[1:])  # (B, K, 1, 1)
            specific.append(all_gather(unit_rows(code * mask(code))))
        self.specific.copy_(torch.cat(specific))
        if both:
            self.agnostic.copy_(torch.cat(agnostic))


def _random_patch(values: Tensor, generator: torch.Generator) -> Tensor:
    """One patch of each image, (B, D, h, w) -> (B, D, 1, 1)."""
    images, _, height, width = values.shape
    drawn = own_slice(torch.randint(height * width, (world_size() * images,), generator=generator))
    patch = upload(drawn, values.device)[:, None, None].expand(-1, values.shape[1], 1)  # (B, D, 1)
    return values.flatten(2).gather(2, patch)[..., None]


def unit_rows(values: Tensor) -> Tensor:
    """(B, K, h, w) -> (B*h*w, K) float32, unit length."""
    return F.normalize(values.permute(0, 2, 3, 1).flatten(0, 2).float(), dim=1)
