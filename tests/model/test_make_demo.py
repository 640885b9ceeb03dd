"""The demo's weights: the script that makes them, and their quality."""

import runpy
import sys

import torch
from torch.nn import functional as F

from dataset import build_data
from dataset.synthetic import NAMES
from model.backbone import FrozenViT
from model.set_quality import patch_classes
from model.weights import backbone_spec, load_backbone
from utils.config.loading import find_option_file, load_options
from utils.files import REPOSITORY
from utils.training.randomness import seeded
from utils.vision.transforms import normalise


def test_script__writes_weights_that_the_demo_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # a script changes it
    script = runpy.run_path(str(REPOSITORY / "model/weights/make_demo.py"))
    script["main"](tmp_path / "demo.safetensors", scenes=6, steps=3, batch_size=2)
    backbone = FrozenViT(backbone_spec(load_options(find_option_file("demo.json"))))
    load_backbone(backbone, str(tmp_path / "demo.safetensors"))


def class_mean_accuracy(backbone, items):
    """Percent of 16 images' patches whose feature is nearest to the mean of their class in 48 others."""
    images, labels = (torch.stack(part) for part in zip(*((i.image, i.label) for i in items), strict=True))
    features = backbone.last_features(backbone.tokens(normalise(images)), (16, 16))  # (B, D, 16, 16)
    rows = F.normalize(features.permute(0, 2, 3, 1).flatten(0, 2), dim=1)  # (N, D)
    classes = patch_classes(labels, 8, n_classes=len(NAMES))  # (N,)
    (rows, held_out), (classes, truth) = (each.split([48 * 256, 16 * 256]) for each in (rows, classes))
    centres = torch.stack([rows[classes == each].mean(dim=0) for each in range(len(NAMES))])  # (C, D)
    return 100 * (torch.cdist(held_out, centres).argmin(dim=1) == truth).double().mean().item()


def test_weights__separate_the_classes():
    options = load_options(find_option_file("demo.json"), {"dataset.train_images": 48})
    with seeded(0, "backbone"):
        backbone = FrozenViT(backbone_spec(options))
    data = build_data(options)
    splits = (data.train_set, 48), (data.validation_set, 16)
    items = [split[index] for split, count in splits for index in range(count)]
    untrained = class_mean_accuracy(backbone, items)
    load_backbone(backbone, options.model.pretrained.pretrained_weights)
    assert class_mean_accuracy(backbone, items) > untrained + 40
