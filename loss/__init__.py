"""The PPAP loss: `propagation` holds the paper's idea, `contrastive` the term it feeds, `ppap` joins both.

What computes them: `streamed`, matrix products over chunks of anchors; or `fused`, by way of `launch`, the
Triton kernels of `kernels`. `ranks` makes the batches of several processes one.
"""

from loss.ppap import PPAPLoss, PPAPLossOutput, ieee_float32

__all__ = ["PPAPLoss", "PPAPLossOutput", "ieee_float32"]
