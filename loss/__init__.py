"""The PPAP loss: `propagation` holds the paper's idea, `contrastive` the term it feeds, `ppap` joins both."""

from loss.ppap import PPAPLoss, PPAPLossOutput, ieee_float32

__all__ = ["PPAPLoss", "PPAPLossOutput", "ieee_float32"]
