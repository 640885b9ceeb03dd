"""Training monitors: non-finite losses, degenerate sets and throughput."""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

from utils.errors import NotFinite, listed
from utils.progress import COLUMNS
from utils.training.device import peak_memory_gib
from utils.training.launch import is_rank_zero

# Training learns little beyond these limits: shares of the bank, and of anchors without a positive.
MOST_POSITIVES, LEAST_NEGATIVES, MOST_ALONE = 0.5, 0.01, 0.5


class NonFiniteGuard:
    """Watches the losses of all steps without waiting for the device.

    With `skip` (`train.skip_nonfinite`) it skips and counts non-finite steps.
    """

    def __init__(self, *, skip: bool, skipped: int = 0) -> None:
        self.skip, self.skipped = skip, skipped
        self._first = torch.zeros(1)  # step and losses of the first such step; step 0: none so far
        self._parts: list[str] = []  # names of these losses

    def observe(self, losses: dict[str, Tensor], *, step: int) -> None:
        """Checks the losses of a step, on their device."""
        values = torch.stack([loss.float() for loss in losses.values()])
        here = torch.cat([values.new_full((1,), step), values])
        if self.skip or not self._parts:
            self._first, self._parts = torch.zeros_like(here), list(losses)
        found = (self._first[0] == 0) & ~torch.isfinite(values).all()
        self._first = torch.where(found, here, self._first)

    @property
    def first_step(self) -> Tensor:
        """The first such step, () on the device, or 0; with `skip`, of the current step only."""
        return self._first[0]

    def raise_if_found(self, data: Any) -> None:
        """Raises NotFinite for the first such step, with its images in `data`; waits for the device."""
        if self.skip or not self._first[0]:
            return
        step, *losses = self._first.tolist()
        parts = [f"{name} {loss:g}" for name, loss in zip(self._parts, losses, strict=True)]
        found = f"the loss is not finite at step {int(step)} ({', '.join(parts)})"
        hint = "lower optimizer.*.lr, set train.precision=fp32, or skip such steps by train.skip_nonfinite"
        raise NotFinite(listed(f"{found}; {hint}. Images of that step", data.image_names(int(step))))

    def skips_step(self) -> bool:
        """Whether to skip the current step, and counts it if so; waits for the device if `skip`."""
        skips = self.skip and bool(self._first[0])
        self.skipped += skips
        return skips


class SetWatch:
    """Prints `sets_warning` once, after ten logged steps or a quarter of the run's, whichever is fewer."""

    def __init__(self) -> None:
        self._seen: list[Mapping[str, float]] = []

    def add(self, scalars: Mapping[str, float], *, patches: int, logged_steps: int) -> None:
        """Adds the scalars of a logged step, whose bank has `patches` entries."""
        due = max(1, min(10, logged_steps // 4))
        if len(self._seen) >= due:
            return
        self._seen.append(scalars)
        warning = sets_warning(self._seen, patches=patches) if len(self._seen) == due else ""
        if warning and is_rank_zero():
            print(f"\n{fill(warning, COLUMNS, break_on_hyphens=False)}", flush=True)


def sets_warning(rows: Sequence[Mapping[str, float]], *, patches: int) -> str:
    """A warning if PPAP's sets, means over logged scalars, are so unbalanced that training learns little."""
    rows = [row for row in rows if "without_positives" in row]  # none with another loss
    if not rows:
        return ""
    names = ("num_positives", "num_negatives", "without_positives")
    positives, negatives, alone = (fmean(row[name] for row in rows) for name in names)
    positives, negatives = positives / patches, negatives / patches
    problems = [f"{positives:.1%} of the patches are positives"] if positives > MOST_POSITIVES else []
    problems += [f"{negatives:.2%} of the patches are negatives"] if negatives < LEAST_NEGATIVES else []
    problems += [f"{alone:.0%} of the anchors have no positive"] if alone > MOST_ALONE else []
    words = (
        f"warning: training learns little: {', '.join(problems)} (logged steps: {len(rows)}). Adapt "
        "training_coeff.initialcrit_pos and training_coeff.initialcrit_amb to the backbone's similarities: "
        "run.py --suggest estimates them without labels; eval.py --explain and, with labels, --measure-sets "
        "show the sets"
    )
    return words if problems else ""


class Throughput:
    """Images per second between two logged steps, validations excluded."""

    def __init__(self) -> None:
        self._images, self._since = 0, 0.0

    def add(self, images: int) -> None:
        """Counts the images of a step."""
        self._images += images

    def restart(self) -> None:
        """Starts a new measurement."""
        self._images, self._since = 0, time.perf_counter()

    def scalars(self, device: torch.device) -> dict[str, float]:
        """`images_per_s` of the measurement, if one was started, and on CUDA the peak memory in GiB."""
        seconds = time.perf_counter() - self._since
        found = {"images_per_s": self._images / seconds} if self._since else {}
        self.restart()
        return found | ({"gpu_memory_gib": peak_memory_gib()} if device.type == "cuda" else {})
