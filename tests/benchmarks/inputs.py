"""Random inputs of the right shapes: features with classes in them, networks, photographs on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dataset import DATA_SETS
from dataset.base import Batch
from model.backbone import FrozenViT
from model.methods import build_segmenter
from model.methods.ppap import build_criterion
from model.module import PPAPModule
from model.weights import backbone_spec
from utils.config.loading import find_option_file, load_options
from utils.config.options import Options
from utils.training.randomness import seeded

SHAPES = {
    "cocostuff": "cocostuff.json",
    "cityscapes": "cityscapes_base.json",
    "potsdam": "potsdam.json",
    "small": "demo.json",
}
CENTRES, ABOVE = 12, 0.07
PHOTOGRAPH = (640, 480)  # the most common size in COCO, (W, H)


def shape_options(shape: str, changed: dict | None = None) -> Options:
    """The options of an experiment with some keys changed."""
    return load_options(find_option_file(SHAPES[shape]), {"wandb.mode": "disabled"} | (changed or {}))


def n_classes_of(options: Options) -> int:
    """The number of classes of a data set."""
    return DATA_SETS[options.dataset.data_type].labels(options.dataset).n_classes


def loss_inputs(options: Options, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of the loss: z (N, D) with a gradient, features (B, D, h, w), anchors (groups, A).

    Patches lie around a dozen centres: cosines a little above Phi_0 in a class, about Psi_0 between two.
    """
    side, dim = options.dataset.res // options.model.pretrained.dino_patch_size, options.model.dim
    patches, criterion = batch * side * side, build_criterion(options)
    drawn = torch.Generator().manual_seed(0)

    def directions(count: int) -> Tensor:
        return F.normalize(torch.randn(count, dim, generator=drawn), dim=1)

    which = torch.randint(CENTRES, (patches,), generator=drawn)
    between, within = criterion.boundaries.psi, criterion.boundaries.phi + ABOVE
    rows = between**0.5 * directions(1) + (within - between) ** 0.5 * directions(CENTRES)[which]
    rows += (1 - within) ** 0.5 * directions(patches)  # (N, D)
    features = rows.view(batch, side, side, dim).permute(0, 3, 1, 2).contiguous()
    anchors = criterion.sample_anchors(patches, drawn)
    return directions(patches).to(device).requires_grad_(), features.to(device), anchors.to(device)


def random_module(options: Options, device: torch.device) -> PPAPModule:
    """The whole network with random weights."""
    labels = DATA_SETS[options.dataset.data_type].labels(options.dataset)
    with seeded(0, "benchmark"):
        segmenter = build_segmenter(options, FrozenViT(backbone_spec(options)), options.model.dim)
    return PPAPModule(options, labels, segmenter).to(device)


def random_batch(options: Options, device: torch.device, n_classes: int) -> Batch:
    """Images and labels of noise."""
    size, side = options.dataloader.batch_size, options.dataset.res
    drawn = torch.Generator().manual_seed(0)
    image = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=drawn)
    label = torch.randint(-1, n_classes, (size, side, side), generator=drawn) % 256  # -1 -> 255
    return Batch(image.to(device), label.to(device), torch.arange(size))


def scene(number: int, size: tuple[int, int], n_classes: int) -> tuple[Image.Image, Image.Image]:
    """A photograph-like image of blurred patches with grain, and its label."""
    drawn = torch.Generator().manual_seed(number)
    width, height = size
    coarse = torch.rand(1, 3, 6, 8, generator=drawn)
    fine = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]  # (3, H, W)
    grain = 0.01 * torch.randn(3, height, width, generator=drawn)
    pixels = (255 * (fine + grain).clamp(0, 1)).byte().permute(1, 2, 0).numpy()
    blobs = torch.rand(1, n_classes, 6, 8, generator=drawn)
    classes = F.interpolate(blobs, size=(height, width), mode="bilinear")[0].argmax(dim=0)
    return Image.fromarray(pixels), Image.fromarray(classes.numpy().astype(np.uint8))


def write_photographs(root: Path, *, images: int, n_classes: int) -> None:
    """A data set of data_type directory."""
    (root / "classes.json").write_text(json.dumps({"n_classes": n_classes}))
    folders = [root / "imgs/train", root / "labels/train"]
    for folder in folders:
        folder.mkdir(parents=True)
    for number in range(images):
        image, label = scene(number, PHOTOGRAPH, n_classes)
        image.save(folders[0] / f"{number}.jpg")
        label.save(folders[1] / f"{number}.png")
