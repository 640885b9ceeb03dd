"""Time and memory of forms of a computation, measured in turn in the same process."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
HEADER = ["", "ms", "peak MiB", "items/s", "x literal"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    form: str
    seconds: float  # median
    spread: float  # half the interquartile range, in seconds
    peak_mib: float  # peak memory beyond what was held before; NaN if unknown
    items: float | None  # per second
    gain: float | None  # seconds of the literal form over these

    def cells(self) -> list[str]:
        """The line as text."""
        return [
            f"{self.case}: {self.form}",
            f"{1e3 * self.seconds:,.1f} ± {1e3 * self.spread:,.1f}",
            "-" if self.peak_mib != self.peak_mib else f"{self.peak_mib:,.0f}",
            "" if self.items is None else f"{self.items:,.1f}",
            "" if self.gain is None else f"{self.gain:.1f}",
        ]


class Bench:
    """Times forms of a computation in turn, `repeats` times after a first run that warms up."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def compare(
        self, case: str, forms: dict[str, Callable[[], Any]], *, items: int | None = None, once: bool = False
    ) -> list[Row]:
        """Rows of the forms, name -> what to run; gains are relative to the one named "literal".

        A run processes `items`. With `once`, the first run, whose memory is measured, is timed too and is the
        only one.
        """
        first = {name: self.first_run(form) for name, form in forms.items()}
        seconds = {name: [spent] if once else [] for name, (spent, _) in first.items()}
        for _ in range(0 if once else self.repeats):
            for name, form in forms.items():
                seconds[name].append(self.once(form))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows = []
        for name, median in medians.items():
            gain = medians["literal"] / median if "literal" in medians and name != "literal" else None
            spread, rate = _half_quartiles(seconds[name]), items and items / median
            rows.append(Row(case, name, median, spread, first[name][1], rate, gain))
        return rows

    def once(self, form: Callable[[], Any]) -> float:
        """Seconds of one run, including the device's work."""
        self._wait()
        start = time.perf_counter()
        form()
        self._wait()
        return time.perf_counter() - start

    def first_run(self, form: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of one run, and its peak memory in MiB beyond what was held before; NaN if unknown."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            return self.once(form), (torch.cuda.max_memory_allocated() - before) / MIB
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # returns what an earlier run has freed
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        except OSError:
            return self.once(form), float("nan")
        before = _status("VmRSS")
        return self.once(form), (_status("VmHWM") - before) / MIB

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _half_quartiles(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def _status(field: str) -> float:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(2**10 * float(line.split()[1]) for line in lines if line.startswith(field))
