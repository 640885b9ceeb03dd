"""The PPAP loss, and those of STEGO (`correspondence`) and HP (`hidden_positive`).

`propagation` is the paper's idea, `contrastive` the loss term of an anchor, `chunked` computes both in chunks
of anchors, and `ppap` is the module that training calls.
"""

from loss.correspondence import correspondence_loss, draw_pairs
from loss.hidden_positive import hidden_positive_loss
from loss.ppap import PPAPLoss, PPAPLossOutput, ieee_float32

__all__ = [
    "PPAPLoss",
    "PPAPLossOutput",
    "correspondence_loss",
    "draw_pairs",
    "hidden_positive_loss",
    "ieee_float32",
]
