from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dataset.base import Batch
from model.backbone import BackboneSpec, FrozenViT
from model.methods.heads import TwoBranchHead
from utils.vision.transforms import normalise

IMAGES, CHANNELS, GRID = 4, 7, (4, 4)


class TinySegmenter(nn.Module):
    """A segmenter of two branches on a random ViT for images of 16 pixels."""

    code_dim = CHANNELS

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = FrozenViT(BackboneSpec(dim=12, depth=2, heads=3, patch=4, native_res=16))
        self.head = TwoBranchHead(12, CHANNELS)

    def grid(self, image):
        return image.shape[-2] // 4, image.shape[-1] // 4

    def encode(self, image):
        return self.backbone.tokens(image)

    def tokens(self, inputs):
        return self.encode(normalise(inputs)) if inputs.dtype == torch.uint8 else inputs.float()

    def features(self, tokens, grid):
        return self.backbone.last_features(tokens, grid)

    def trainable(self):
        return list(self.head.parameters())


@pytest.fixture
def segmenter():
    return TinySegmenter()


@pytest.fixture
def batch_of():
    def make(seed):
        """Random images of four colours each, so that patches resemble each other."""
        drawn = torch.Generator().manual_seed(seed)
        blocks = torch.randint(256, (IMAGES, 3, 2, 2), generator=drawn, dtype=torch.uint8)
        images = blocks.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)  # (4, 3, 16, 16)
        return Batch(images, torch.zeros(IMAGES, 16, 16, dtype=torch.uint8), torch.arange(IMAGES))

    return make


def hp_options(options, **changed):
    """Options with a section for HP."""
    chosen = {
        "rho": 0.5,
        "alpha": 0.05,
        "pool_size": 2 * IMAGES,
        "ema_m": 0.9,
        "warmup": 1,
        "renew_interval": 2,
        "reweighting": True,
        "published_colour": False,
    }
    sections = {name: getattr(options, name) for name in ("training_coeff", "train", "model", "optimizer")}
    return SimpleNamespace(hp=SimpleNamespace(**chosen | changed), **sections)


@pytest.fixture
def options_of(tiny_options):
    def make(dropout=0.1, **changed):
        options = tiny_options(model__criterion_dropout=dropout, optimizer__net__weight_decay=0.1)
        return hp_options(options, **changed)

    return make
