import pytest
import torch

from dataset.base import Batch
from model.backbone import BackboneSpec, FrozenViT
from model.segmenter import BranchSegmenter

IMAGES, CHANNELS, GRID = 4, 7, (4, 4)
HP_OPTIONS = {
    "method": "hp",
    "hp.rho": 0.5,
    "hp.pool_size": 2 * IMAGES,
    "hp.ema_m": 0.9,
    "hp.warmup": 1,
    "hp.renew_interval": 2,
    "optimizer.net.weight_decay": 0.1,
}


def tiny_segmenter():
    """A head of two branches on a random ViT for images of 16 pixels."""
    torch.manual_seed(0)
    return BranchSegmenter(
        FrozenViT(BackboneSpec(dim=12, depth=2, heads=3, patch=4, native_res=16)), CHANNELS
    )


@pytest.fixture
def segmenter():
    return tiny_segmenter()


@pytest.fixture
def batch_of():
    def make(seed):
        """Random images of four colours each, so that patches resemble each other."""
        drawn = torch.Generator().manual_seed(seed)
        blocks = torch.randint(256, (IMAGES, 3, 2, 2), generator=drawn, dtype=torch.uint8)
        images = blocks.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)  # (4, 3, 16, 16)
        return Batch(images, torch.zeros(IMAGES, 16, 16, dtype=torch.uint8), torch.arange(IMAGES))

    return make


@pytest.fixture
def options_of(tiny_options):
    def make(dropout=0.1, **changed):
        """Options of HP; changed ones without their section."""
        chosen = HP_OPTIONS | {f"hp.{key}": value for key, value in changed.items()}
        return tiny_options(**chosen, model__criterion_dropout=dropout)

    return make
