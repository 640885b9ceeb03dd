"""What becomes of a loss that is no number: the run stops and tells where, or leaves the step out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from model.scalars import StepLosses
from utils.errors import NotFinite, listed


class NonFinite:
    """Watches the losses of all steps without waiting for the device.

    Args:
        skip: `train.skip_nonfinite`.

    Attributes:
        skipped: steps left out so far.
    """

    def __init__(self, *, skip: bool) -> None:
        self.skip, self.skipped = skip, 0
        self._first: torch.Tensor | None = None  # (4,) step, PPAP, linear and cluster loss; step 0: none yet

    def note(self, losses: StepLosses, *, step: int) -> None:
        """Looks at the losses of a step, on their device."""
        absent = losses.total.new_zeros(())
        parts = [losses.ppap.loss if losses.ppap is not None else absent]
        parts += [absent if part is None else part for part in (losses.linear, losses.cluster)]
        here = torch.stack([absent + step, *parts])
        if self._first is None or self.skip:
            self._first = torch.zeros_like(here)
        met = (self._first[0] == 0) & ~torch.isfinite(here).all()
        self._first = torch.where(met, here, self._first)

    def stop_if_met(self, names: Callable[[int], list[str]]) -> None:
        """Ends the run where a step was not finite and none is to be left out; waits for the device.

        Args:
            names: the images of a step's batch.

        Raises:
            NotFinite: with step, parts of the loss and images.
        """
        if self.skip or self._first is None or not self._first[0]:
            return
        step, ppap, linear, cluster = self._first.tolist()
        raise NotFinite(
            listed(
                f"the loss is not finite at step {int(step)} (PPAP {ppap:g}, linear {linear:g}, cluster "
                f"{cluster:g}); lower optimizer.*.lr, set train.precision=fp32, or leave such steps out with "
                "train.skip_nonfinite=true. The images of that step",
                names(int(step)),
            )
        )

    def skips(self) -> bool:
        """Whether the step in hand is to be left out, which is counted; waits for the device."""
        skips = self.skip and bool(self._first[0])
        self.skipped += skips
        return skips
