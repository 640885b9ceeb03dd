"""What is watched while training: throughput, and losses that are not finite."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from utils.errors import NotFinite, listed
from utils.training.device import peak_memory_gib

PARTS = ("supcon_loss", "linear_loss", "cluster_loss")


class NonFiniteGuard:
    """Watches the losses of all steps without waiting for the device.

    Args:
        skip: `train.skip_nonfinite`: skip such steps and count them instead of stopping.
        skipped: steps skipped before a resume.
    """

    def __init__(self, *, skip: bool) -> None:
        self.skip, self.skipped = skip, 0
        self._first: Tensor | None = None  # (4,) step, PPAP, linear and cluster loss; step 0: none so far

    def observe(self, losses: dict[str, Tensor], *, step: int) -> None:
        """Checks the losses of a step, on their device."""
        total = losses["cluster_loss"]
        parts = [losses[name] if name in losses else total.new_zeros(()) for name in PARTS]
        here = torch.stack([total.new_full((), step), *parts])  # (4,)
        if self._first is None or self.skip:
            self._first = torch.zeros_like(here)
        found = (self._first[0] == 0) & ~torch.isfinite(here).all()
        self._first = torch.where(found, here, self._first)

    def raise_if_found(self, names: Callable[[int], list[str]]) -> None:
        """Stops the run if a step was not finite and such steps are not skipped; waits for the device.

        Args:
            names: maps a step to the images of its batch.

        Raises:
            NotFinite: names the step, the parts of the loss and the images.
        """
        if self.skip or self._first is None or not self._first[0]:
            return
        step, ppap, linear, cluster = self._first.tolist()
        raise NotFinite(
            listed(
                f"the loss is not finite at step {int(step)} (PPAP {ppap:g}, linear {linear:g}, cluster "
                f"{cluster:g}); lower optimizer.*.lr, set train.precision=fp32, or skip such steps with "
                "train.skip_nonfinite=true. The images of that step",
                names(int(step)),
            )
        )

    def skips_step(self) -> bool:
        """Whether to skip the current step, and counts it; waits for the device only if steps are skipped."""
        skips = self.skip and bool(self._first[0])
        self.skipped += skips
        return skips

    def restore(self, skipped: int) -> None:
        """Continues the count of a resumed run."""
        self.skipped = skipped


class Throughput:
    """Images per second between two logged steps, validations excluded."""

    def __init__(self) -> None:
        self.images = 0
        self._since: float | None = None
        self._paused = 0.0

    def add(self, images: int) -> None:
        """Counts the images of a step."""
        self.images += images

    def pause(self) -> None:
        """Stops the clock."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Restarts the clock."""
        if self._since is not None:
            self._since += time.perf_counter() - self._paused

    def scalars(self, device: torch.device) -> dict[str, float]:
        """`images_per_s` since the last call (from the second on), and on CUDA the peak memory in GiB."""
        now, found = time.perf_counter(), {}
        if self._since is not None:
            found["images_per_s"] = self.images / (now - self._since)
        self.images, self._since = 0, now
        if device.type == "cuda":
            found["gpu_memory_gib"] = peak_memory_gib()
        return found


def to_floats(scalars: dict[str, Any]) -> dict[str, float]:
    """Tensors and numbers as Python floats, with one wait for the device."""
    tensors = {name: value for name, value in scalars.items() if isinstance(value, Tensor)}
    if tensors:
        device = next(iter(tensors.values())).device
        stacked = torch.stack([value.detach().to(device, torch.float32) for value in tensors.values()])
        scalars = scalars | dict(zip(tensors, stacked.tolist(), strict=True))
    return {name: float(value) for name, value in scalars.items()}
