import pytest
import torch
from torch.nn import functional as F

from dataset import build_data
from model.backbone import FrozenViT
from model.quality import PatchFeatures, backbone_worth, kmeans_accuracy, linear_accuracy, patch_features
from model.weights import backbone_spec, load_backbone
from utils.config.loading import find_option_file, load_options, with_changes
from utils.training.randomness import seeded


def blobs(spread, *, seed):
    drawn = torch.Generator().manual_seed(seed)
    """Three classes at 120 degrees from each other, so that k-means arrives from any start."""
    classes = torch.arange(300) % 3
    around = torch.tensor([[1, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
    rows = 10 * F.pad(around, (0, 6))[classes] + spread * torch.randn(300, 8, generator=drawn)
    return PatchFeatures(F.normalize(rows, dim=1), classes)


def test_accuracy__of_what_is_plain_and_of_noise():
    for measure in (linear_accuracy, kmeans_accuracy):
        plain = measure(blobs(0.1, seed=0), blobs(0.1, seed=1), n_classes=3, seed=0)
        noise = measure(blobs(1e4, seed=0), blobs(1e4, seed=1), n_classes=3, seed=0)
        assert plain == pytest.approx(100, abs=0.1)
        assert 25 < noise < 55 < plain


def test_patch_features__leaves_out_what_has_no_label(tiny_options):
    data = build_data(tiny_options())
    image, label = (torch.stack([data.train_set[index][part] for index in range(2)]) for part in (0, 1))
    label[0] = 255
    backbone = FrozenViT(backbone_spec(tiny_options()))
    found = patch_features(backbone, image, label, batch_size=1)
    assert found.rows.shape == (16, 24)
    torch.testing.assert_close(found.rows.norm(dim=1), torch.ones(16))


def test_demo_weights__are_worth_more_than_an_untrained_backbone():
    """Both accuracies by the 15 points that the README tells of, on fewer scenes than there."""
    options = load_options(find_option_file("demo.json"))
    options = with_changes(options, {"dataset.train_images": 96, "dataset.val_images": 16})
    data = build_data(options)
    found = {}
    for name in ("untrained", "shipped"):
        with seeded(0, "backbone"):
            backbone = FrozenViT(backbone_spec(options))
        if name == "shipped":
            load_backbone(backbone, options.model.pretrained.pretrained_weights)
        splits = [
            [split[index] for index in range(len(split))] for split in (data.train_set, data.validation_set)
        ]
        found[name] = list(backbone_worth(backbone, *splits, n_classes=7, seed=0).values())
    for before, after in zip(found["untrained"], found["shipped"], strict=True):
        assert after > before + 15
