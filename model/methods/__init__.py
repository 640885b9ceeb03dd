"""The methods by name, and the network that each of them trains."""

from collections.abc import Callable
from typing import NamedTuple

from model.backbone import Backbone
from model.methods.base import Method
from model.methods.hp import HP
from model.methods.ppap import PPAP, Frozen
from model.methods.stego import STEGO
from model.segmenter import BlockSegmenter, BranchSegmenter, Segmenter
from utils.config.options import METHODS, Options, register_name


class Kind(NamedTuple):
    """A method and its network."""

    method: Callable[[Options, Segmenter], Method]
    segmenter: Callable[..., Segmenter]


_kinds = {
    "ppap": Kind(PPAP, BlockSegmenter),
    "frozen": Kind(Frozen, BlockSegmenter),
    "stego": Kind(STEGO, BranchSegmenter),
    "hp": Kind(HP, BranchSegmenter),
}


def register_method(
    name: str,
    method: Callable[[Options, Segmenter], Method],
    segmenter: Callable[..., Segmenter] = BlockSegmenter,
) -> None:
    """Makes your own method available as `method=<name>`.

    Args:
        name: must not be built in; registering a name again replaces it.
        method: takes all options and the network, returns a `Method`.
        segmenter: takes the backbone, `model.dim` and `compile`, returns the network: `BlockSegmenter`,
            `BranchSegmenter` or a `Segmenter` of your own.
    """
    register_name(METHODS, name)
    _kinds[name] = Kind(method, segmenter)


def build_segmenter(options: Options, backbone: Backbone, code_dim: int) -> Segmenter:
    """The untrained network around a backbone."""
    return _kinds[options.trained_by].segmenter(backbone, code_dim, compile=options.train.compile)


def build_method(options: Options, segmenter: Segmenter) -> Method:
    """The losses of a run."""
    return _kinds[options.trained_by].method(options, segmenter)
