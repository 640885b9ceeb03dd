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
from model.methods.local_mixing import mix_local
from model.segmenter import Segmenter, dropout_mask
from utils.config.options import Options
from utils.training.device import upload
from utils.training.distributed import all_gather, all_reduce_mean, own_slice, rank, world_size
from utils.training.randomness import derived_seed, generator, seeded
from utils.vision.transforms import normalise

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
        # M rows of unit length, (M, D) and (M, K); buffers, so that a resumed run compares with the same
        self.pools = nn.Module()
        for name, dim in (("agnostic", segmenter.backbone.spec.dim), ("specific", self.channels)):
            rows = torch.zeros(options.hp.pool_size, dim, dtype=torch.float16)
            self.pools.register_buffer(name, rows)

    def groups(self, segmenter: Segmenter) -> list[tuple[list[nn.Parameter], Any]]:
        """The head, and the projection at the same rate without decay."""
        net = self.options.optimizer.net
        without_decay = net.model_copy(update={"weight_decay": 0.0})
        return [(segmenter.trainable(), net), (list(self.projection.parameters()), without_decay)]

    def reference_images(self, step: int, batch_idx: int) -> int:
        """The size of the pools if they are to be renewed before this step."""
        due = step == 1 or (batch_idx > 0 and batch_idx % self.chosen.renew_interval == 0)
        return self.chosen.pool_size if due else 0

    @torch.no_grad()
    def prepare(self, segmenter: Segmenter, batches: Iterable[Any], step: int) -> None:
        """Renews the pool of codes, in the first step also that of features, by one patch of each image.

        The two take different patches. Every rank passes its slices of the same batches, M images in all, and
        ends with the same pools.
        """
        drawn, agnostic, specific = generator(self.seed, "pools", step), [], []
        for batch in batches:
            grid = segmenter.grid(batch.label)
            features = segmenter.features(segmenter.tokens(batch.inputs), grid)  # (B, D, h, w)
            masks = [self._mask(features, drawn) for _ in range(3)]
            patch = random_patch(features, drawn)  # (B, D, 1, 1)
            agnostic.append(all_gather(unit_rows(patch * masks[0])))
            code = self.average(random_patch(features, drawn), masks[1:])  # (B, K, 1, 1)
            specific.append(all_gather(unit_rows(code * self._mask(code, drawn))))
        self.pools.specific.copy_(torch.cat(specific))
        if step == 1:
            self.pools.agnostic.copy_(torch.cat(agnostic))

    def draws(self, images: int, grid: tuple[int, int], step: int, *, dim: int) -> dict[str, Any]:
        """Dropout masks by what they apply to."""
        names = {"linear": dim, "average linear": dim, "nonlinear": dim, "average nonlinear": dim}
        names |= {"features": dim, "average": self.channels, "mixed": self.channels}
        if self.chosen.alpha:
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
            weight_dtype=torch.float32,  # see loss/README.md
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

    def _mask(self, values: Tensor, drawn: torch.Generator) -> Tensor:
        mask = dropout_mask(values.shape[:2], probability=self.dropout, generator=drawn)
        return upload(mask, values.device)

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


def unit_rows(values: Tensor) -> Tensor:
    """(B, K, h, w) -> (B*h*w, K) float32, unit length."""
    return F.normalize(values.permute(0, 2, 3, 1).flatten(0, 2).float(), dim=1)


def random_patch(values: Tensor, drawn: torch.Generator) -> Tensor:
    """One patch of each image, (B, D, h, w) -> (B, D, 1, 1)."""
    images, _, height, width = values.shape
    chosen = own_slice(torch.randint(height * width, (world_size() * images,), generator=drawn))
    patch = upload(chosen, values.device)[:, None, None].expand(-1, values.shape[1], 1)  # (B, D, 1)
    return values.flatten(2).gather(2, patch)[..., None]
