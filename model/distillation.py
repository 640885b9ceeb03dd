"""DINO self-distillation of a small ViT: where the demo's weights come from.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021: a student sees all
crops of an image, a teacher, its momentum average, the large ones; the student learns to say of each crop
what the teacher says of another, and centring and sharpening keep the teacher from saying always the same.

Fitted to scenes of textures, of which a crop shows several: what is said is said of each patch, and a
student's patch is held against what the teacher says at that place of the scene.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from model.backbone import FrozenViT
from model.weights import backbone_spec
from utils.config.options import Options
from utils.errors import UserError
from utils.files import make_folder, replacing
from utils.training.randomness import generator, seeded
from utils.vision.transforms import normalise


@dataclass(frozen=True)
class Recipe:
    """How long and how; sides and distances in pixels, temperatures as in DINO."""

    steps: int = 1400
    batch_size: int = 64
    global_side: int = 48
    local_side: int = 24
    local_crops: int = 4
    zoom: float = 1.25  # a crop is magnified by 1/zoom to zoom
    spread: float = 12.0  # how far a crop's centre lies from that of the others at most, each way
    contrast: float = 2.0  # a crop's contrast is multiplied by 1/contrast to contrast
    prototypes: int = 64
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    momentum: float = 0.98  # of the teacher at first; 1 at the end
    centre_momentum: float = 0.9
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.04
    centred: float = 0.68  # share of the mean feature that is taken out in the end


@dataclass(frozen=True)
class Crop:
    """A crop of every scene of a batch, and where it lies.

    Attributes:
        images: (B, 3, side, side), normalised.
        scale: (B, 2), half its sides in units of half a scene's side (x, y); negative where it is mirrored.
        centre: (B, 2), its centre in a scene that reaches from -1 to 1.
    """

    images: Tensor
    scale: Tensor
    centre: Tensor


class Distilled(nn.Module):
    """A ViT and a head that scores its patches against K prototypes, as student and as teacher."""

    def __init__(self, vit: FrozenViT, prototypes: int, *, hidden: int = 192, bottleneck: int = 64) -> None:
        super().__init__()
        dim = vit.spec.dim
        self.vit = vit
        self.head = nn.Sequential(
            nn.BatchNorm1d(dim, affine=False),
            nn.Linear(dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to cosines with the prototypes (B, K, h, w)."""
        side = images.shape[-1] // self.vit.spec.patch
        patches = self.vit.to_map(self.vit.blocks[-1](self.vit.encode(images)), (side, side))  # (B, D, h, w)
        rows = F.normalize(self.head(patches.permute(0, 2, 3, 1).flatten(0, 2)), dim=1)  # (B*h*w, bottleneck)
        scores = rows @ F.normalize(self.prototypes, dim=1).T
        return scores.view(len(images), side, side, -1).permute(0, 3, 1, 2)


@torch.no_grad()
def spread_init(vit: FrozenViT) -> None:
    """Where distillation starts: linear layers by Xavier, patch filters without their mean.

    A small ViT as timm initialises it hardly reaches its nonlinear range, and colour drowns what little it
    says of texture; with nothing to agree on but noise, student and teacher agree on nothing.
    """
    for module in vit.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    filters = vit.patch_embed.proj.weight  # (D, 3, patch, patch)
    filters -= filters.mean(dim=(2, 3), keepdim=True)


@torch.no_grad()
def centre_features(vit: FrozenViT, scenes: Tensor, *, share: float, batch_size: int = 64) -> None:
    """Takes a share of the mean patch feature of some scenes out of the last norm's bias.

    The head's batch norm leaves the mean free, and it fills up the cosines that PPAP compares: medians of
    0.90 within a class and 0.76 between classes. With two thirds of it gone they lie where those of real
    self-supervised features do, near 0.65 and 0.2, and the paper's boundaries fit.
    """
    side = scenes.shape[-1] // vit.spec.patch
    means = [
        vit.last_features(vit.tokens(normalise(part)), (side, side)).mean(dim=(0, 2, 3))
        for part in scenes.split(batch_size)
    ]  # (D,) each
    vit.norm.bias -= share * torch.stack(means).mean(dim=0)


@dataclass(frozen=True)
class Backbones:
    """The same network before and after; both on the CPU."""

    untrained: FrozenViT
    distilled: FrozenViT


def distilled_backbone(options: Options, scenes: Tensor, *, centred_on: int) -> Backbones:
    """The backbone that the options describe, distilled on scenes.

    Args:
        options: `model.*` and `train.seed`.
        scenes: (S, 3, H, W) uint8, on the device to train on.
        centred_on: how many of the scenes say what the mean feature is.
    """
    recipe, seed = Recipe(), options.train.seed
    with seeded(seed, "backbone"):
        untrained = FrozenViT(backbone_spec(options))
    start = copy.deepcopy(untrained)
    with seeded(seed, "distillation start"):
        spread_init(start)
    distilled = distil(start.to(scenes.device), scenes, recipe=recipe, seed=seed).cpu()
    centre_features(distilled, scenes[:centred_on].cpu(), share=recipe.centred)
    return Backbones(untrained, distilled)


def save_backbone(vit: FrozenViT, path: Path) -> Path:
    """Writes its weights as safetensors, whole or not at all; returns the path."""
    make_folder(path.parent)
    with replacing(path) as temporary:
        save_file(vit.state_dict(), temporary)
    return path


def distil(vit: FrozenViT, scenes: Tensor, *, recipe: Recipe, seed: int) -> FrozenViT:
    """Trains a ViT on scenes without labels and returns the teacher's.

    Args:
        vit: where to start; left as it is.
        scenes: (S, 3, H, W) uint8, on the device to train on.
        recipe: how long and how.
        seed: of head, order, crops and colours.

    Raises:
        UserError: the loss is not finite.
    """
    with seeded(seed, "distillation head"):
        student = Distilled(copy.deepcopy(vit), recipe.prototypes).to(scenes.device).requires_grad_(True)
    teacher = copy.deepcopy(student).requires_grad_(False)
    centre = torch.zeros(recipe.prototypes, device=scenes.device)  # (K,)
    optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    with trange(recipe.steps, desc="DINO self-distillation", unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * _schedule(step, recipe)
            crops = draw_crops(scenes, recipe, generator(seed, "distillation", step))
            with torch.no_grad():
                targets = [teacher(crop.images) for crop in crops[:2]]  # (B, K, h, w) each
            loss = distillation_loss(
                [student(c.images) for c in crops], targets, centre=centre, crops=crops, recipe=recipe
            )
            if not torch.isfinite(loss):
                raise UserError(f"the distillation's loss is {loss.item()} at step {step}; lower Recipe.lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            optimizer.step()
            centre.lerp_(torch.stack(targets).mean(dim=(0, 1, 3, 4)), 1 - recipe.centre_momentum)
            rest = (1 + math.cos(math.pi * step / recipe.steps)) / 2
            _follow(teacher, student, 1 - (1 - recipe.momentum) * rest)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return teacher.vit


def distillation_loss(
    scores: list[Tensor], targets: list[Tensor], *, centre: Tensor, crops: list[Crop], recipe: Recipe
) -> Tensor:
    """Mean cross-entropy of each student patch with what the teacher says at its place in another crop, ().

    Args:
        scores: the student's, (B, K, h, w) for each crop, the teacher's crops first.
        targets: the teacher's, (B, K, h, w) for each of its crops.
        centre: running mean of the teacher's scores, (K,).
        crops: where they lie.
        recipe: the temperatures.
    """
    total, patches = 0.0, 0.0
    for place, target in enumerate(targets):
        sharpened = ((target - centre[:, None, None]) / recipe.teacher_temperature).softmax(dim=1)
        for other, score in enumerate(scores):
            if other == place:
                continue
            there = places(crops[other], crops[place], side=score.shape[-1])  # (B, h, w, 2)
            inside = (there.abs() <= 1).all(dim=-1)  # (B, h, w)
            wanted = F.grid_sample(sharpened, there, padding_mode="border", align_corners=False)
            entropy = -(wanted * (score / recipe.student_temperature).log_softmax(dim=1)).sum(dim=1)
            total = total + (entropy * inside).sum()
            patches = patches + inside.sum()
    return total / patches


def places(crop: Crop, other: Crop, *, side: int) -> Tensor:
    """Where side x side patch centres of a crop lie in another that reaches from -1 to 1, (B, h, w, 2)."""
    line = (2 * torch.arange(side, device=crop.scale.device) + 1) / side - 1  # (side,)
    own = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)  # (h, w, 2), x before y
    scene = own * crop.scale[:, None, None] + crop.centre[:, None, None]  # (B, h, w, 2)
    return (scene - other.centre[:, None, None]) / other.scale[:, None, None]


def draw_crops(scenes: Tensor, recipe: Recipe, drawn: torch.Generator) -> list[Crop]:
    """Two large and some small crops around one place of each scene of a batch, each in other colours.

    Args:
        scenes: (S, 3, H, W) uint8.
        recipe: sizes.
        drawn: a CPU generator.
    """
    chosen = torch.randint(len(scenes), (recipe.batch_size,), generator=drawn)
    images = scenes[chosen.to(scenes.device)].float() / 255  # (B, 3, H, W)
    around = 2 * torch.rand(len(images), 2, generator=drawn) - 1  # (B, 2)
    sides = [recipe.global_side] * 2 + [recipe.local_side] * recipe.local_crops
    return [_crop(images, around, side, recipe, drawn) for side in sides]


def _crop(images: Tensor, around: Tensor, side: int, recipe: Recipe, drawn: torch.Generator) -> Crop:
    count, whole = len(images), images.shape[-1]
    zoom = recipe.zoom ** (2 * torch.rand(count, 1, generator=drawn) - 1)  # (B, 1)
    reach = (side / whole / zoom).expand(-1, 2)  # (B, 2)
    jitter = (2 * torch.rand(count, 2, generator=drawn) - 1) * 2 * recipe.spread / whole
    centre = torch.minimum(torch.maximum(around + jitter, reach - 1), 1 - reach)  # (B, 2), inside the scene
    mirrored = 1 - 2 * (torch.rand(count, 2, generator=drawn) < 0.5).float()
    scale, centre = (reach * mirrored).to(images), centre.to(images)
    affine = torch.cat([torch.diag_embed(scale), centre[:, :, None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(affine, [count, 3, side, side], align_corners=False)
    cut = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return Crop(recolour(cut, recipe, drawn), scale, centre)


def recolour(images: Tensor, recipe: Recipe, drawn: torch.Generator) -> Tensor:
    """Channels permuted, negated, stretched and shifted at random, some grey: of a scene's colours nothing is
    left but where they change. (B, 3, H, W) in [0, 1] in, normalised out.
    """
    count = len(images)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(count, *shape, 1, 1, generator=drawn).to(images) - 1

    order = uniform(3).argsort(dim=1)  # (B, 3, 1, 1)
    gain = recipe.contrast ** uniform(1) * uniform(1).sign() * (1 + 0.3 * uniform(3))
    grey = uniform(1) < -0.6
    images = torch.take_along_dim(images, order, dim=1)
    images = torch.where(grey, images.mean(dim=1, keepdim=True), images)
    mean = images.mean(dim=(2, 3), keepdim=True)  # (B, 3, 1, 1)
    return normalise(255 * ((images - mean) * gain + 0.5 + 0.3 * uniform(3)).clamp(0, 1))


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warmup, then a cosine to zero, as a share of the rate."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return (1 + math.cos(math.pi * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))) / 2


@torch.no_grad()
def _follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """The teacher becomes momentum * teacher + (1 - momentum) * student."""
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast.detach(), 1 - momentum)
