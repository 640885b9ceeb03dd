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
    path = tmp_path / "there/demo.safetensors"
    words = ["--out", str(path), "--scenes", "6", "--steps", "3", "--batch_size", "2"]
    monkeypatch.setattr(sys, "argv", ["make_demo.py", *words])
    monkeypatch.setattr(sys, "path", [*sys.path])  # a script changes it
    runpy.run_path(str(REPOSITORY / "model/weights/make_demo.py"), run_name="__main__")
    backbone = FrozenViT(backbone_spec(load_options(find_option_file("demo.json"))))
    load_backbone(backbone, str(path))
    assert all(torch.isfinite(value).all() for value in backbone.state_dict().values())


def class_mean_accuracy(backbone, data):
    """Percent of validation patches whose feature is nearest to the mean train feature of their class."""
    splits = []
    for split, count in ((data.train_set, 48), (data.validation_set, 16)):
        items = [split[index] for index in range(count)]
        images, labels = (
            torch.stack(parts) for parts in zip(*((i.image, i.label) for i in items), strict=True)
        )
        features = backbone.last_features(backbone.tokens(normalise(images)), (16, 16))  # (B, D, 16, 16)
        rows = F.normalize(features.permute(0, 2, 3, 1).flatten(0, 2), dim=1)  # (N, D)
        splits.append((rows, patch_classes(labels, 8, n_classes=len(NAMES))))
    (rows, classes), (held_out, truth) = splits
    centres = torch.stack([rows[classes == each].mean(dim=0) for each in range(len(NAMES))])  # (C, D)
    return 100 * (torch.cdist(held_out, centres).argmin(dim=1) == truth).double().mean().item()


def test_weights__separate_the_classes():
    options = load_options(find_option_file("demo.json"), {"dataset.train_images": 48})
    with seeded(0, "backbone"):
        backbone = FrozenViT(backbone_spec(options))
    data = build_data(options)
    untrained = class_mean_accuracy(backbone, data)
    load_backbone(backbone, options.model.pretrained.pretrained_weights)
    assert class_mean_accuracy(backbone, data) > untrained + 40
