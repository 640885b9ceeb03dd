"""HP: contrasts patches with hidden positives, globally by reference pools and locally by attention.

Seong, Moon, Lee, Heo, "Leveraging Hidden Positives for Unsupervised Semantic Segmentation", CVPR 2023; the
contrastive loss is in loss/hidden_positive.py.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import ColorJitter, Compose, GaussianBlur, RandomApply, RandomGrayscale

from loss.hidden_positive import hidden_positive_loss
from model.methods.base import Method, MethodOutput, Progress
from model.methods.pools import ReferencePools, unit_rows
from model.segmenter import Segmenter, dropout_mask
from utils.config.options import Options
from utils.training.distributed import all_reduce_mean, rank, world_size
from utils.training.randomness import derived_seed, generator, seeded
from utils.vision.transforms import normalise

SIGMA = 28.0  # scale of the attention, at any grid
QUANTILES = (0.1, 0.9)  # the logits of each patch are clipped to these
SIDE = 3  # patches per side of a neighbourhood
COLOUR_VIEW = Compose(  # leaves every pixel where it is
    [ColorJitter(0.3, 0.3, 0.3, 0.1), RandomGrayscale(0.2), RandomApply([GaussianBlur(5, (0.1, 2.0))], 0.5)]
)


class HP(Method):
    """The loss of HP, its projection, the momentum average of the head and the reference pools.

    All three are in the checkpoint. The average is updated in each forward pass, before the optimizer's step.
    """

    def __init__(self, options: Options, segmenter: Segmenter) -> None:
        super().__init__(options, segmenter)
        self.chosen, self.seed = options.hp, options.train.seed
        self.dropout, self.channels = options.model.criterion_dropout, segmenter.code_dim
        self.average = copy.deepcopy(segmenter.head).requires_grad_(False)
        with seeded(self.seed, "hp projection"):
            self.projection = nn.Linear(self.channels, self.channels)
        self.pools = ReferencePools(options.hp.pool_size, segmenter.backbone.spec.dim, self.channels)

    def groups(self, segmenter: Segmenter) -> list[tuple[list[nn.Parameter], Any]]:
        """The head, and the projection at the same rate without decay."""
        net = self.options.optimizer.net
        without_decay = net.model_copy(update={"weight_decay": 0.0})
        return [(segmenter.trainable(), net), (list(self.projection.parameters()), without_decay)]

    def reference_images(self, step: int, batch_idx: int) -> int:
        """The size of the pools if they are to be renewed before this step."""
        due = step == 1 or (batch_idx > 0 and batch_idx % self.chosen.renew_interval == 0)
        return self.chosen.pool_size if due else 0

    def prepare(self, segmenter: Segmenter, batches: Iterable[Any], step: int) -> None:
        """Renews the pool of codes, in the first step also that of features."""
        drawn, both = generator(self.seed, "pools", step), step == 1
        self.pools.renew(segmenter, self.average, batches, drawn, dropout=self.dropout, both=both)

    def draws(self, images: int, grid: tuple[int, int], step: int, *, dim: int) -> dict[str, Any]:
        """Dropout masks by what they apply to."""
        names = {"linear": dim, "average linear": dim, "nonlinear": dim, "average nonlinear": dim}
        names |= {"features": dim, "average": self.channels, "mixed": self.channels}
        names |= {"view linear": dim, "view nonlinear": dim}
        drawn, found = generator(self.seed, "dropout", step), {}
        for name, channels in names.items():
            found[name] = dropout_mask((images, channels), probability=self.dropout, generator=drawn)
        return found

    def forward(
        self, segmenter: Segmenter, batch: Any, draws: dict[str, Any], progress: Progress
    ) -> MethodOutput:
        """The code with dropout, the contrastive loss and, if alpha > 0, the distance to the second view."""
        grid = segmenter.grid(batch.label)
        tokens = segmenter.tokens(batch.inputs)  # (B, T, D)
        features = segmenter.features(tokens, grid)  # (B, D, h, w)
        code = segmenter.head(features, (draws["linear"], draws["nonlinear"]))  # (B, K, h, w)
        averaged = self.average(features, (draws["average linear"], draws["average nonlinear"]))
        update_average(self.average, segmenter.head, momentum=self.chosen.ema_m)
        mixed = mix_local(code, segmenter.backbone.attention_logits(tokens, grid)[:, None])  # (B, K, h, w)
        z, lmbd = self._project(code), specific_weight(progress.step, progress.total, self.chosen.warmup)
        loss = hidden_positive_loss(
            z,
            self._project(mixed * draws["mixed"]),
            f=unit_rows(features * draws["features"]),
            e=unit_rows(averaged * draws["average"]),
            pool_ag=self.pools.agnostic,
            pool_sp=self.pools.specific,
            keep=self._kept(len(z), math.prod(grid), progress.step),
            spatial_size=grid[0],
            lmbd=lmbd,
            tau=self.options.training_coeff.tau,
            reweighting=self.chosen.reweighting,
        )
        losses = {"hp_loss": loss}
        if self.chosen.alpha:
            with torch.autocast(z.device.type, enabled=False):  # which would round a blur to float16
                view = self._view(batch.inputs, progress.step)
            view = segmenter.encode(view)  # (B, T, D)
            branches = draws["view linear"], draws["view nonlinear"]
            other = self._project(segmenter.head(segmenter.features(view, grid), branches))
            distance = F.pairwise_distance(z, other).mean()
            losses["consistency_loss"] = self.chosen.alpha * all_reduce_mean(distance)
        return MethodOutput(code, losses, {"lambda": torch.full((), lmbd, device=z.device)})

    def _project(self, code: Tensor) -> Tensor:
        """Unit-length projections (B*h*w, K) float32."""
        return F.normalize(self.projection(code.permute(0, 2, 3, 1).flatten(0, 2)).float(), dim=1)

    def _kept(self, rows: int, block: int, step: int) -> Tensor:
        """The random part of the denominators, (block, N) bool, equal on all ranks."""
        device = self.projection.weight.device
        drawn = torch.Generator(device).manual_seed(derived_seed(self.seed, "denominator", step))
        return torch.rand(block, world_size() * rows, generator=drawn, device=device) < self.chosen.rho

    def _view(self, images: Tensor, step: int) -> Tensor:
        """Normalised images in other colours, of uint8 images (B, 3, H, W).

        `published_colour` changes the colours of normalised images, whose values are then clamped to [0, 1].
        """
        published, changed = self.chosen.published_colour, []
        given = normalise(images) if published else images / 255
        for number, image in enumerate(given, start=rank() * len(given)):  # in the global batch
            with seeded(self.seed, "colour view", step, number):
                changed.append(COLOUR_VIEW(image))
        return torch.stack(changed) if published else normalise(255 * torch.stack(changed))


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, *, momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * current, in place, for all parameters."""
    for kept, new in zip(average.parameters(), current.parameters(), strict=True):
        kept.lerp_(new, 1 - momentum)


def specific_weight(step: int, total: int, warmup: int) -> float:
    """lambda in a step, from 1: 0 during the warmup, then rising linearly; 0 if the warmup never ends."""
    return max(0, step - 1 - warmup) / (total - warmup) if total > warmup else 0.0


@torch.no_grad()
def local_attention(attention_logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention of each patch to its 3x3 neighbourhood, (B, 9, h, w) float32; 0 outside the grid.

    `attention_logits` (B, heads, T, T) are those of the frozen last block before softmax. Heads are averaged,
    and tokens before the patches ignored.
    """
    (height, width), device, found = grid, attention_logits.device, []
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    patches = height * width
    for image in attention_logits:  # one at a time, as sorting takes several times the memory
        logits = image[:, -patches:, -patches:].float().mean(dim=0)  # (h*w, h*w)
        ordered = logits.sort(dim=1).values  # (h*w, h*w)
        low, high = (_quantile(ordered, share) for share in QUANTILES)  # (h*w, 1) each
        attention = logits.clamp(low, high).softmax(dim=1)
        attention = torch.where(attention < 1 / patches, 0, SIGMA * attention)  # 1 / (h*w) is the mean
        padded = F.pad(attention.view(height, width, height, width), (1, 1, 1, 1))  # (h, w, h + 2, w + 2)
        near = [padded[rows, columns, rows + y, columns + x] for y in range(SIDE) for x in range(SIDE)]
        found.append(torch.stack(near))  # (9, h, w)
    return torch.stack(found)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """A quantile of each sorted row, interpolated, (n, 1); torch.quantile would wait for a GPU."""
    place = share * (ordered.shape[1] - 1)
    below = int(place)
    values = ordered[:, below : below + 2]  # (n, 2), or (n, 1) at the end
    return values[:, :1].lerp(values[:, -1:], place - below)


def mix_local(code: Tensor, attention_logits: Tensor) -> Tensor:
    """The mean over each patch's 3x3 neighbourhood of attention times code, (B, K, h, w).

    Only neighbours inside the grid count; attention below the patch's mean is set to 0. The gradient flows to
    the code (B, K, h, w) of all neighbours. For the logits see `local_attention`.
    """
    grid = code.shape[-2:]
    attention = local_attention(attention_logits, grid)  # (B, 9, h, w)
    neighbours = sum(_shifted(code.new_ones(grid)))  # (h, w): 4 in corners, 6 at borders, 9 inside
    mixed = sum(a[:, None] * part for a, part in zip(attention.unbind(1), _shifted(code), strict=True))
    return mixed / neighbours


def _shifted(values: Tensor) -> list[Tensor]:
    """The nine neighbours of each position of (..., h, w), 0 outside, in the order of `local_attention`."""
    height, width = values.shape[-2:]
    padded = F.pad(values, (1, 1, 1, 1))  # (..., h + 2, w + 2)
    return [padded[..., y : y + height, x : x + width] for y in range(SIDE) for x in range(SIDE)]
