"""The two probes that read the code: a linear classifier and cosine clusters."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.training.distributed import all_reduce, all_reduce_mean
from utils.vision.labels import IGNORE


class LinearProbe(nn.Module):
    """A 1x1 convolution from the code (D channels) to class logits."""

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(dim, n_classes, 1)

    def forward(self, code: Tensor) -> Tensor:
        """(B, D, h, w) -> logits (B, n_classes, h, w)."""
        return self.classifier(code)

    def loss(self, code: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy over valid pixels of the logits upsampled to the label, () float32.

        The mean is over the valid pixels of all processes; without any it is 0 with a graph.

        Args:
            code: (B, D, h, w), detached by the caller.
            label: (B, H, W) integer; values outside [0, n_classes) are ignored.
        """
        logits = F.interpolate(self(code), size=label.shape[-2:], mode="bilinear").float()  # (B, C, H, W)
        label = label.long()
        ignored = (label < 0) | (label >= logits.shape[1])
        target = label.masked_fill(ignored, IGNORE)
        # the loss of maps has no deterministic kernel on CUDA
        if logits.is_cuda and torch.are_deterministic_algorithms_enabled():
            logits, target = logits.permute(0, 2, 3, 1).flatten(0, 2), target.flatten()  # (B*H*W, C)
        total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        return all_reduce(total) / all_reduce((~ignored).sum()).clamp_min(1)


class ClusterProbe(nn.Module):
    """K centroids that the code is assigned to by cosine similarity."""

    def __init__(self, dim: int, n_clusters: int) -> None:
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(n_clusters, dim))

    def inner(self, code: Tensor) -> Tensor:
        """code . normalised centroid, (B, D, h, w) -> (B, K, h, w).

        It has the argmax of the cosine but is linear in the code, so it commutes with bilinear upsampling.
        """
        return F.conv2d(code, F.normalize(self.clusters, dim=1)[:, :, None, None].to(code.dtype))

    def forward(self, code: Tensor) -> Tensor:
        """Cosine similarities, (B, D, h, w) -> (B, K, h, w)."""
        return self.inner(F.normalize(code, dim=1))

    def loss(self, code: Tensor) -> Tensor:
        """Minus the mean similarity to the nearest centroid, () float32, over all processes."""
        return -all_reduce_mean(self(code).float().amax(dim=1).mean())


def read_both(code: Tensor, *, linear: LinearProbe, cluster: ClusterProbe) -> dict[str, Tensor]:
    """`cluster.inner` (B, K, h, w) and `linear` (B, C, h, w) of a float32 code, in one product."""
    weights = [F.normalize(cluster.clusters, dim=1), linear.classifier.weight.flatten(1)]
    both = torch.cat(weights) @ code.flatten(2)  # (B, K + C, h*w)
    inner, logits = both.unflatten(2, code.shape[2:]).split([len(part) for part in weights], dim=1)
    return {"cluster": inner, "linear": logits + linear.classifier.bias[:, None, None]}
