"""Makes the demo's backbone weights: python model/weights/make_demo.py

DINO self-distillation (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021)
of a small ViT on synthetic scenes without labels. As a crop of a scene shows several textures, the teacher, a
momentum average of the student, predicts per patch: for each patch of a crop, the student learns what the
teacher predicts at the same place of the scene in another crop.
To judge the result: python eval.py --opt demo_eval.json --measure-sets
"""

import copy
import math
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file: imports start at the root of the project
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from dataset import build_data
from model.backbone import FrozenViT
from model.weights import backbone_spec
from utils.config.loading import load_options
from utils.files import REPOSITORY
from utils.training.randomness import generator, seeded
from utils.vision.transforms import normalise

CROP_SIDES = (48, 48, 24, 24, 24, 24)  # pixels; the teacher sees the first two
ZOOM = 1.25  # crops are magnified by 1 / ZOOM to ZOOM
SPREAD = 12.0  # maximal distance in pixels, along each axis, of a crop's centre from that of the others
CONTRAST = 2.0  # the contrast of a crop is multiplied by 1 / CONTRAST to CONTRAST
PROTOTYPES, HIDDEN, BOTTLENECK = 64, 192, 64
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
MOMENTUM, CENTRE_MOMENTUM = 0.98, 0.9  # of the teacher at the start (1 at the end), and of the centre
LR, WARMUP, WEIGHT_DECAY, GRAD_NORM = 1e-3, 50, 0.04, 3.0


class Crop(NamedTuple):
    """A crop of each scene; places are (x, y) in a scene that extends from -1 to 1."""

    images: Tensor  # (B, 3, side, side), normalised
    scale: Tensor  # half its sides, (B, 2); negative if mirrored
    centre: Tensor  # (B, 2)


class PatchClassifier(nn.Module):
    """A ViT with a head that compares its patches with prototypes; the student and the teacher."""

    def __init__(self, vit: FrozenViT) -> None:
        super().__init__()
        self.vit, dim = vit, vit.spec.dim
        head = [nn.Linear(dim, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.GELU(), nn.Linear(HIDDEN, BOTTLENECK)]
        self.head = nn.Sequential(nn.BatchNorm1d(dim, affine=False), *head)
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, BOTTLENECK))

    def forward(self, images: Tensor) -> Tensor:
        """Cosines (B, K, h, w) of normalised images (B, 3, H, W) with the prototypes."""
        patches = last_features(self.vit, images)  # (B, D, h, w)
        rows = F.normalize(self.head(patches.permute(0, 2, 3, 1).flatten(0, 2)), dim=1)  # (B*h*w, bottleneck)
        cosines = rows @ F.normalize(self.prototypes, dim=1).T  # (B*h*w, K)
        return cosines.view(len(images), *patches.shape[2:], -1).permute(0, 3, 1, 2)


def last_features(vit: FrozenViT, images: Tensor) -> Tensor:
    """Features (B, D, h, w) of normalised square images (B, 3, H, W)."""
    side = images.shape[-1] // vit.spec.patch
    return vit.last_features(vit.tokens(images), (side, side))


def distil(vit: FrozenViT, scenes: Tensor, *, steps: int, batch_size: int) -> FrozenViT:
    """Trains a copy of a ViT on scenes (S, 3, H, W) uint8 and returns that of the teacher."""
    with seeded(0, "distillation head"):
        student = PatchClassifier(copy.deepcopy(vit)).requires_grad_(True)
    teacher = copy.deepcopy(student).requires_grad_(False)
    centre = torch.zeros(PROTOTYPES)  # (K,), running mean of the teacher's scores
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=WEIGHT_DECAY)
    for step in trange(steps, desc="DINO self-distillation", unit="step"):
        decay = (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP))) / 2
        optimizer.param_groups[0]["lr"] = LR * ((step + 1) / WARMUP if step < WARMUP else decay)
        crops = draw_crops(scenes, batch_size, generator(0, "distillation", step))
        targets = [teacher(crop.images) for crop in crops[:2]]  # (B, K, h, w) each
        loss = distillation_loss([student(crop.images) for crop in crops], targets, centre, crops)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), GRAD_NORM)
        optimizer.step()
        centre.lerp_(torch.stack(targets).mean(dim=(0, 1, 3, 4)), 1 - CENTRE_MOMENTUM)
        momentum = 1 - (1 - MOMENTUM) * (1 + math.cos(math.pi * step / steps)) / 2
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast.detach(), 1 - momentum)
    return teacher.vit


def distillation_loss(
    scores: list[Tensor], targets: list[Tensor], centre: Tensor, crops: list[Crop]
) -> Tensor:
    """Mean cross-entropy of the student's patches with the teacher's predictions for their places."""
    total, patches = 0.0, 0.0
    for first, target in enumerate(targets):
        sharpened = ((target - centre[:, None, None]) / TEACHER_TEMPERATURE).softmax(dim=1)
        for second, score in enumerate(scores):
            if second == first:
                continue
            there = positions(crops[second], crops[first], side=score.shape[-1])  # (B, h, w, 2)
            inside = (there.abs() <= 1).all(dim=-1)  # (B, h, w)
            wanted = F.grid_sample(sharpened, there, padding_mode="border", align_corners=False)
            entropy = -(wanted * (score / STUDENT_TEMPERATURE).log_softmax(dim=1)).sum(dim=1)
            total, patches = total + (entropy * inside).sum(), patches + inside.sum()
    return total / patches


def positions(crop: Crop, other: Crop, *, side: int) -> Tensor:
    """Positions of the side x side patch centres of a crop in another one, from -1 to 1, (B, h, w, 2)."""
    line = (2 * torch.arange(side) + 1) / side - 1  # (side,)
    own = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)  # (h, w, 2), x before y
    scene = own * crop.scale[:, None, None] + crop.centre[:, None, None]  # (B, h, w, 2)
    return (scene - other.centre[:, None, None]) / other.scale[:, None, None]


def draw_crops(scenes: Tensor, batch_size: int, rng: torch.Generator) -> list[Crop]:
    """Mirrored and recoloured crops of `CROP_SIDES` around one place in each scene of a batch."""
    chosen = torch.randint(len(scenes), (batch_size,), generator=rng)
    images = scenes[chosen].float() / 255  # (B, 3, H, W)
    around = 2 * torch.rand(batch_size, 2, generator=rng) - 1  # (B, 2)
    crops, whole = [], images.shape[-1]
    for side in CROP_SIDES:
        zoom = ZOOM ** (2 * torch.rand(batch_size, 1, generator=rng) - 1)  # (B, 1)
        reach = (side / whole / zoom).expand(-1, 2)  # (B, 2)
        jitter = (2 * torch.rand(batch_size, 2, generator=rng) - 1) * 2 * SPREAD / whole
        centre = torch.minimum(torch.maximum(around + jitter, reach - 1), 1 - reach)  # inside the scene
        mirrored = 1 - 2 * (torch.rand(batch_size, 2, generator=rng) < 0.5).float()
        scale = reach * mirrored  # (B, 2)
        affine = torch.cat([torch.diag_embed(scale), centre[:, :, None]], dim=2)  # (B, 2, 3)
        grid = F.affine_grid(affine, [batch_size, 3, side, side], align_corners=False)
        cut = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        crops.append(Crop(recolour(cut, rng), scale, centre))
    return crops


def recolour(images: Tensor, rng: torch.Generator) -> Tensor:
    """Normalised (B, 3, H, W) images with channels permuted, inverted, scaled and shifted, some of them grey.

    Only the edges of colours survive, so that the network learns textures.
    """

    def uniform(channels: int) -> Tensor:
        return 2 * torch.rand(len(images), channels, 1, 1, generator=rng) - 1

    order = uniform(3).argsort(dim=1)  # (B, 3, 1, 1)
    gain = CONTRAST ** uniform(1) * uniform(1).sign() * (1 + 0.3 * uniform(3))
    grey = uniform(1) < -0.6
    images = torch.take_along_dim(images, order, dim=1)
    images = torch.where(grey, images.mean(dim=1, keepdim=True), images)
    mean = images.mean(dim=(2, 3), keepdim=True)  # (B, 3, 1, 1)
    return normalise(255 * ((images - mean) * gain + 0.5 + 0.3 * uniform(3)).clamp(0, 1))


def main(out: Path, *, scenes: int = 2048, steps: int = 1400, batch_size: int = 64) -> None:
    """Trains the backbone that demo.json describes and writes its weights."""
    demo = REPOSITORY / "json/demo.json"
    options = load_options(demo, {"dataset.train_images": scenes, "dataloader.batch_size": 1})
    train_set = build_data(options).train_set
    images = torch.stack([train_set[index].image for index in range(scenes)])  # (S, 3, H, W) uint8
    with seeded(0, "backbone"):
        vit = FrozenViT(backbone_spec(options))
    # with timm's initial values, a small ViT is nearly linear, and its features are dominated by colour
    with seeded(0, "distillation start"):
        for module in vit.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    filters = vit.patch_embed.proj.weight  # (D, 3, patch, patch)
    filters -= filters.mean(dim=(2, 3), keepdim=True)
    vit = distil(vit, images, steps=steps, batch_size=batch_size)
    # the loss does not constrain the mean feature, which would dominate cosines
    shown = images[: load_options(demo).dataset.train_images].split(64)  # the images of the demo
    means = [last_features(vit, normalise(part)).mean(dim=(0, 2, 3)) for part in shown]  # (D,) each
    vit.norm.bias -= torch.stack(means).mean(dim=0)
    save_file(vit.state_dict(), out)


if __name__ == "__main__":
    main(REPOSITORY / "model/weights/demo.safetensors")
