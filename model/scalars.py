"""The losses of a training step, and the scalars that are logged of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loss import PPAPLossOutput
from utils.training.trainer import peak_memory_gib

REACHED = ("mean_phi", "mean_psi", "mean_propagation", "without_positives")  # of PPAPLossOutput.reached


@dataclass(frozen=True)
class StepLosses:
    """The losses of a training step; None for a part that is left out."""

    total: Tensor
    cluster: Tensor
    linear: Tensor | None
    ppap: PPAPLossOutput | None

    def detach(self) -> StepLosses:
        """The same numbers without the graph, which holds a gradient of the batch's size."""
        return StepLosses(
            self.total.detach(),
            self.cluster.detach(),
            None if self.linear is None else self.linear.detach(),
            None if self.ppap is None else replace(self.ppap, loss=self.ppap.loss.detach()),
        )

    def scalars(self) -> dict[str, Tensor]:
        """Each under the name that it is logged by; `train_loss` is that of the probes, as published."""
        found = {"total_loss": self.total, "cluster_loss": self.cluster, "train_loss": self.cluster}
        if self.linear is not None:
            found |= {"linear_loss": self.linear, "train_loss": self.linear + self.cluster}
        if self.ppap is not None:
            found |= {
                "supcon_loss": self.ppap.loss,
                "num_positives": self.ppap.num_positives,
                "num_negatives": self.ppap.num_negatives,
            }
            if self.ppap.reached is not None:
                found |= dict(zip(REACHED, self.ppap.reached.unbind(), strict=True))
        return found


class Pace:
    """Images a second from one log to the next; a pause counts for nothing."""

    def __init__(self) -> None:
        self.images = 0
        self._since: float | None = None
        self._paused = 0.0

    def pause(self) -> None:
        """Until `resume`, time does not count."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Ends a pause."""
        if self._since is not None:
            self._since += time.perf_counter() - self._paused

    def scalars(self, device: torch.device) -> dict[str, float]:
        """`images_per_s` since the last call, from the second on, and on CUDA the peak memory in GiB."""
        now, found = time.perf_counter(), {}
        if self._since is not None:
            found["images_per_s"] = self.images / (now - self._since)
        self.images, self._since = 0, now
        if device.type == "cuda":
            found["gpu_memory_gib"] = peak_memory_gib()
        return found


def plain_numbers(scalars: dict[str, Any]) -> dict[str, float]:
    """The same as Python numbers; a GPU is waited for once."""
    tensors = {name: value for name, value in scalars.items() if isinstance(value, Tensor)}
    if not tensors:
        return {name: float(value) for name, value in scalars.items()}
    device = next(iter(tensors.values())).device
    read = torch.stack([value.detach().to(device, torch.float32) for value in tensors.values()]).tolist()
    read = dict(zip(tensors, read, strict=True))
    return {name: float(read.get(name, value)) for name, value in scalars.items()}
