"""The PPAP loss, and those of STEGO (`correspondence`) and HP (`hidden_positive`).

`propagation` is the paper's idea, `contrastive` the loss term of an anchor, `chunked` computes both with the
gradient in chunks of anchors, and `ppap` is the module that training calls.
"""

from loss.correspondence import correspondence_loss, draw_pairs
from loss.hidden_positive import hidden_positive_loss
from loss.kernels import ieee_float32
from loss.ppap import PPAPLoss, PPAPLossOutput
