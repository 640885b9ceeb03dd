"""The published computation in its literal form: a direct transcription of the paper.

Tested against the golden numbers. On CUDA the loss is float32, where the published one is partly float16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2

from loss.propagation import Boundaries
from utils.vision.transforms import MEAN, STD


def ppap_loss(z: Tensor, features: Tensor, anchors: Tensor, *, boundaries: Boundaries, tau: float) -> Tensor:
    """The loss group by group, proxies as means over an (A, N, D) tensor; autograd gives the gradient.

    Takes z (N, D), features (B, D, h, w) and anchors (groups, A), all used; each group has a positive.
    """
    f = F.normalize(features.permute(0, 2, 3, 1).flatten(0, 2), dim=1)  # (N, D)
    losses = []
    for group in anchors:  # (A,)
        proxies = f[group]  # (A, D)
        phi = torch.full_like(proxies[:, :1], boundaries.phi)  # (A, 1)
        psi = torch.full_like(proxies[:, :1], boundaries.psi)
        similarity = proxies @ f.T  # (A, N)
        for _ in range(boundaries.steps):
            inside = similarity > phi
            members = torch.where(inside[:, :, None], f[None], 0.0)  # (A, N, D)
            mean = members.sum(dim=1) / inside.sum(dim=1, keepdim=True)
            moved_to = F.normalize(mean, dim=1)
            moved = 1 - F.cosine_similarity(proxies, moved_to)[:, None]  # (A, 1)
            phi, psi = phi - moved / boundaries.sigma_pos, psi + moved / boundaries.sigma_amb
            proxies = moved_to
            similarity = proxies @ f.T
        itself = F.one_hot(group, len(f)).bool()  # (A, N)
        positives = (similarity > phi) & ~itself
        kept = positives | ((similarity < psi) & ~itself)
        logits = z[group] @ z.T / tau
        log_total = torch.where(kept, logits, -torch.inf).logsumexp(dim=1, keepdim=True)
        count = positives.sum(dim=1)
        per_anchor = -((logits - log_total) * positives).sum(dim=1) / count.clamp_min(1)
        losses.append(tau / 0.07 * per_anchor[count > 0].mean())
    return torch.stack(losses).mean()


def predictions(
    code: Tensor, size: tuple[int, int], *, linear: nn.Module, centroids: Tensor
) -> dict[str, Tensor]:
    """Both probes on the upsampled code: `linear` and `cluster` (B, H, W) int64, `cosines` (B, K, H, W)."""
    full = F.interpolate(code, size=size, mode="bilinear")  # (B, D, H, W)
    cosines = F.conv2d(F.normalize(full, dim=1), F.normalize(centroids, dim=1)[:, :, None, None])
    return {"linear": linear(full).argmax(dim=1), "cluster": cosines.argmax(dim=1), "cosines": cosines}


def confusion(prediction: Tensor, label: Tensor, counts: np.ndarray) -> None:
    """Adds a batch to (C, K) counts, on the CPU."""
    prediction, label = prediction.cpu().numpy().ravel(), label.cpu().numpy().ravel()
    valid = label < len(counts)
    flat = label[valid] * counts.shape[1] + prediction[valid]
    counts += np.bincount(flat, minlength=counts.size).reshape(counts.shape)


@lru_cache(maxsize=1)
def _transforms(res: int) -> tuple[Callable, Callable, Callable]:
    """Resize and crop, conversion to a normalised tensor, and the changes of the second view."""
    shape = [v2.Resize(res, interpolation=InterpolationMode.NEAREST), v2.CenterCrop(res)]
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    change = [
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.3, 0.3, 0.3, 0.1)], p=0.8),
        v2.RandomApply([v2.GaussianBlur(5)], p=0.5),
    ]
    return v2.Compose(shape), v2.Compose(tensor), v2.Compose(change)


def two_views(image: Image.Image, label: Image.Image, res: int, rule: np.ndarray) -> tuple[Tensor, ...]:
    """A train item with the published second view, which nothing reads: (image, second view, label)."""
    shape, tensor, change = _transforms(res)
    image, label = shape(image), shape(label)
    classes = torch.from_numpy(rule[np.asarray(label)])  # (H, W)
    return tensor(image), tensor(change(image)), classes
