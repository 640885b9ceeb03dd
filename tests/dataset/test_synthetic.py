import numpy as np
import torch
from scipy.cluster.vq import kmeans2

from dataset import build_data
from dataset.synthetic import NAMES, Synthetic
from utils.vision.metrics import ConfusionMatrix, score
from utils.vision.transforms import normalise


def test_scenes__are_deterministic_and_differ(tiny_options):
    options = tiny_options().dataset
    first, again, other = Synthetic(options, "train"), Synthetic(options, "train"), Synthetic(options, "val")
    assert np.array_equal(first.read(3).image, again.read(3).image)
    assert np.array_equal(first.read(3).label, again.read(3).label)
    assert not np.array_equal(first.read(3).image, first.read(4).image)
    assert not np.array_equal(first.read(3).image, other.read(3).image)


def test_scenes__every_class_occurs_and_labels_are_known(tiny_options):
    source = Synthetic(tiny_options(dataset__train_images=60).dataset, "train")
    counts = sum(
        np.bincount(np.asarray(source.read(i).label).ravel(), minlength=len(NAMES)) for i in range(60)
    )
    assert len(counts) == len(NAMES)
    assert (counts / counts.sum()).min() > 0.05
    assert 6 <= len(NAMES) <= 8


def accuracy(prediction, label, n_predictions, *, matched):
    metric = ConfusionMatrix(len(NAMES), n_predictions)
    metric.update(torch.as_tensor(prediction), torch.as_tensor(label))
    return score(metric.compute(), matched=matched).accuracy


def test_scenes__are_no_colour_quiz(tiny_options, shared):
    """k-means on raw colour lies at least 20 points below a linear probe on real self-supervised features."""
    from model.backbone import FrozenViT
    from model.weights import backbone_spec, load_backbone

    options = tiny_options(
        model__arch="dinov2", model__dim=384, model__pretrained__dino_patch_size=14,
        model__pretrained__depth=10, dataset__res=224, dataset__val_res=224, dataset__train_images=24,
        dataset__val_images=12,
    )  # fmt: skip
    data = build_data(options)
    backbone = FrozenViT(backbone_spec(options))
    load_backbone(backbone, str(shared / "data/weights/vits14_depth10.pth"))

    def patches(split):
        items = [split[index] for index in range(len(split))]
        images, labels = torch.stack([i.image for i in items]), torch.stack([i.label for i in items])
        tokens = torch.cat([backbone.tokens(normalise(part)) for part in images.split(6)])
        features = backbone.last_features(tokens, (16, 16)).permute(0, 2, 3, 1).flatten(0, 2)
        colours = (
            images.unfold(2, 14, 14)
            .unfold(3, 14, 14)
            .float()
            .mean((-1, -2))
            .permute(0, 2, 3, 1)
            .flatten(0, 2)
        )
        return features, colours, labels[:, 7::14, 7::14].flatten()

    features, _, label = patches(data.train_set)
    held_features, colours, held_label = patches(data.validation_set)
    probe = torch.nn.Linear(384, len(NAMES))
    optimizer = torch.optim.Adam(probe.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(probe(features), label).backward()
        optimizer.step()
    linear = accuracy(probe(held_features).argmax(1), held_label, len(NAMES), matched=False)
    best_colour = max(
        accuracy(
            kmeans2(colours.numpy(), len(NAMES), seed=seed, minit="++")[1],
            held_label,
            len(NAMES),
            matched=True,
        )
        for seed in range(3)
    )
    assert best_colour + 20 <= linear
