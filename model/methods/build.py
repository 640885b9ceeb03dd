"""Builds the method that the options select, and the segmenter that it trains."""

from model.backbone import FrozenViT
from model.methods.base import Method
from model.methods.ppap import PPAP, Frozen
from model.segmenter import BlockSegmenter, Segmenter
from utils.config.options import Options


def build_segmenter(options: Options, backbone: FrozenViT) -> Segmenter:
    """The untrained network around a backbone."""
    return BlockSegmenter(backbone, compile=options.train.compile)


def build_method(options: Options) -> Method:
    """The losses of a run."""
    return Frozen(options) if options.train.frozen else PPAP(options)
