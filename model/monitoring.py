"""What is watched while training: throughput, and losses that are not finite."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from utils.errors import NotFinite, listed
from utils.training.device import peak_memory_gib

PARTS = {"supcon_loss": "PPAP", "linear_loss": "linear", "cluster_loss": "cluster"}


class NonFiniteGuard:
    """Watches the losses of all steps without waiting for the device.

    Args:
        skip: `train.skip_nonfinite`: skip such steps and count them instead of stopping.
        skipped: steps skipped before a resume.
    """

    def __init__(self, *, skip: bool, skipped: int = 0) -> None:
        self.skip, self.skipped = skip, skipped
        self._first: Tensor | None = None  # (1 + parts,) step and its losses; step 0: none so far
        self._parts: list[str] = []

    def observe(self, losses: dict[str, Tensor], *, step: int) -> None:
        """Checks the losses of a step, on their device."""
        values = torch.stack([loss.float() for loss in losses.values()])
        here = torch.cat([values.new_full((1,), step), values])
        if self._first is None or self.skip:
            self._first, self._parts = torch.zeros_like(here), list(losses)
        found = (self._first[0] == 0) & ~torch.isfinite(values).all()
        self._first = torch.where(found, here, self._first)

    def raise_if_found(self, data: Any) -> None:
        """Stops the run if a step was not finite and such steps are not skipped; waits for the device.

        Args:
            data: the data module, which names the images of that step.
        """
        if self.skip or self._first is None or not self._first[0]:
            return
        step, *losses = self._first.tolist()
        parts = [f"{PARTS[name]} {loss:g}" for name, loss in zip(self._parts, losses, strict=True)]
        raise NotFinite(
            listed(
                f"the loss is not finite at step {int(step)} ({', '.join(parts)}); lower optimizer.*.lr, set "
                "train.precision=fp32, or skip such steps with train.skip_nonfinite=true. The images of that "
                "step",
                data.image_names(int(step)),
            )
        )

    def skips_step(self) -> bool:
        """Whether to skip the current step, and counts it; waits for the device only if steps are skipped."""
        skips = self.skip and bool(self._first[0])
        self.skipped += skips
        return skips


class Throughput:
    """Images per second between two logged steps, validations excluded."""

    def __init__(self) -> None:
        self._images, self._since, self._paused = 0, 0.0, 0.0

    def add(self, images: int) -> None:
        """Counts the images of a step."""
        self._images += images

    def pause(self) -> None:
        """Stops the clock."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Restarts the clock."""
        if self._since:
            self._since += time.perf_counter() - self._paused

    def scalars(self, device: torch.device) -> dict[str, float]:
        """`images_per_s` since the last call (from the second on), and on CUDA the peak memory in GiB."""
        now = time.perf_counter()
        found = {"images_per_s": self._images / (now - self._since)} if self._since else {}
        self._images, self._since = 0, now
        if device.type == "cuda":
            found["gpu_memory_gib"] = peak_memory_gib()
        return found
