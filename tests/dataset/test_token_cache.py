"""Tokens cached in memory and in files."""

import csv
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

import run
from dataset.base import SegmentationDataset
from dataset.token_cache import cache_tokens
from utils.errors import UserError
from utils.vision.transforms import Geometry

MODEL = "some digest 32-true"


def encode(image):
    """Two tokens of three channels from (B, 3, H, W)."""
    flat = image.float().flatten(2) / 255  # (B, 3, H*W)
    return torch.stack([flat.mean(dim=2), flat.amax(dim=2)], dim=1)  # (B, 2, 3)


def forbidden(image):
    raise AssertionError("the cache was not reused")


@pytest.fixture
def items(data_of, directory):
    return data_of("directory", directory).train_set


@pytest.fixture
def tokens_of(tiny_options):
    def build(items, encode=encode, *, kind="disk", model=MODEL):
        options = tiny_options(dataset__cache_features=kind, dataloader__val_batch_size=3)
        about = {"split": "train", "token_shape": lambda res: (2, 3), "model": model}
        return cache_tokens(items, encode, options, device=torch.device("cpu"), **about)

    return build


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cache__holds_tokens_and_labels_of_each_item(items, tokens_of, kind):
    found = tokens_of(items, kind=kind)
    assert len(found) == len(items) == 4  # a batch of three and a leftover
    for index in range(4):
        item = found[(7, index)]
        assert item.image is None
        assert torch.equal(item.inputs, encode(items[index].image[None])[0].half())
        assert torch.equal(item.label, items[index].label)
        assert (item.label == 255).any()
        assert item.index == index


def test_cache__is_reused_by_a_later_run(items, tokens_of, tmp_path):
    first, second = tokens_of(items), tokens_of(items, forbidden)
    assert torch.equal(first[3].inputs, second[3].inputs)
    (made,) = tmp_path.glob("output/tokens/train-*")
    assert sorted(path.name for path in made.iterdir()) == ["labels.npy", "tokens.npy"]


@pytest.mark.parametrize("change", ["weights", "geometry", "image", "label", "rule"])
def test_cache__is_not_reused_after_a_change(items, tokens_of, change):
    tokens_of(items)
    model = MODEL
    if change == "weights":
        model = "another"
    elif change == "geometry":
        items = SegmentationDataset(items.source, Geometry(64))
    elif change == "rule":
        items.source.rule[0] = 2
    else:
        path = items.source.files(0)[0 if change == "image" else 1]
        path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(AssertionError, match="not reused"):
        tokens_of(items, forbidden, model=model)


def test_cache__interrupted_leaves_nothing(items, tokens_of, tmp_path):
    def interrupt(image):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokens_of(items, interrupt)
    assert not [path for path in tmp_path.glob("output/tokens/*") if path.is_dir()]


def test_space__too_little_is_an_error(items, tokens_of, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10))
    with pytest.raises(UserError, match=r"cache_features is disk: only .* GiB are free in .*tokens;"):
        tokens_of(items, forbidden)


def test_training__same_losses_to_the_rounding_of_float16(tiny_file, tmp_path, no_figures):
    losses = {}
    for kind in (None, "ram", "disk"):
        path = tiny_file(dataset__cache_features=kind, wandb__name=str(kind), eval__is_crf=False)
        run.main(["--opt", path, "dataloader.num_workers=1", "train.print_freq=1"])
        with (tmp_path / "output" / str(kind) / "metrics.csv").open() as lines:
            losses[kind] = [float(row["total_loss"]) for row in csv.DictReader(lines) if row["total_loss"]]
    assert len(losses[None]) == 4
    assert losses["ram"] == losses["disk"]
    np.testing.assert_allclose(losses["ram"], losses[None], rtol=1e-3)
    (kept,) = (tmp_path / "output/tokens").glob("train-*")
    assert np.load(kept / "tokens.npy").shape == (16, 17, 24)
