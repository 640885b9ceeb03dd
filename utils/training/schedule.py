"""Where a step stands in a run: its epoch, whether a validation follows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """All steps of a run, counted from 1.

    Attributes:
        per_epoch: steps an epoch.
        epochs: of the run.
        valid_freq: steps between validations, besides the one that ends each epoch.
    """

    per_epoch: int
    epochs: int
    valid_freq: int

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.per_epoch * self.epochs

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return (step - 1) // self.per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether it is the last step of its epoch."""
        return step % self.per_epoch == 0

    def validates(self, step: int) -> bool:
        """Whether a validation follows: each `valid_freq` steps of an epoch, and at its end."""
        return self.ends_epoch(step) or (step % self.per_epoch) % self.valid_freq == 0
