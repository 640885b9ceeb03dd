"""The PPAP loss.

`propagation` is the paper's idea, `contrastive` the loss term of an anchor, `chunked` computes both in chunks
of anchors, and `ppap` is the module that training calls.
"""

from loss.ppap import PPAPLoss, PPAPLossOutput, ieee_float32

__all__ = ["PPAPLoss", "PPAPLossOutput", "ieee_float32"]
