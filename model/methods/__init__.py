"""The methods by name, and the network that each of them trains."""

from collections.abc import Callable

from model.backbone import Backbone
from model.methods.base import Method
from model.methods.hp import HP
from model.methods.ppap import PPAP, Frozen
from model.methods.stego import STEGO
from model.segmenter import BlockSegmenter, BranchSegmenter, Segmenter
from utils.config.options import METHODS, Options, register_name

_kinds: dict[str, tuple[Callable[[Options, Segmenter], Method], Callable[..., Segmenter]]] = {
    "ppap": (PPAP, BlockSegmenter),
    "frozen": (Frozen, BlockSegmenter),
    "stego": (STEGO, BranchSegmenter),
    "hp": (HP, BranchSegmenter),
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
    _kinds[name] = method, segmenter


def build_segmenter(options: Options, backbone: Backbone, code_dim: int) -> Segmenter:
    """The untrained network around a backbone."""
    _, segmenter = _kinds[options.trained_by]
    return segmenter(backbone, code_dim, compile=options.train.compile)


def build_method(options: Options, segmenter: Segmenter) -> Method:
    """The losses of a run."""
    method, _ = _kinds[options.trained_by]
    return method(options, segmenter)
