"""Time, memory and the floor that the hardware sets, all measured in the same process."""

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

from loss import ieee_float32

MIB = 2**20
HEADER = ["", "ms", "peak MiB", "items/s", "x literal", "floor ms", "x floor", "operands"]


@dataclass(frozen=True)
class Cost:
    """The least work of a computation."""

    operations: float  # floating-point additions and products of its matrix products
    bytes: float  # each input read and each output written once
    operand: torch.dtype = torch.float32  # of the products


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    form: str
    seconds: float  # median
    spread: float  # half the interquartile range, in seconds
    peak_mib: float  # peak memory beyond what was held before; NaN if unknown
    items: float | None = None  # per second
    gain: float | None = None  # seconds of the literal form over these
    floor: float | None = None  # seconds of the operations or the bytes at the measured rates
    operand: str = ""  # types that the floor is measured in

    def cells(self) -> list[str]:
        """The line as text."""

        def shown(value: float | None, text: str) -> str:
            return "" if value is None else text.format(value)

        return [
            f"{self.case}: {self.form}",
            f"{1e3 * self.seconds:,.1f} ± {1e3 * self.spread:,.1f}",
            "-" if self.peak_mib != self.peak_mib else f"{self.peak_mib:,.0f}",
            shown(self.items, "{:,.1f}"),
            shown(self.gain, "{:.1f}"),
            shown(self.floor and 1e3 * self.floor, "{:,.1f}"),
            shown(self.floor and self.seconds / self.floor, "{:.1f}"),
            self.operand,
        ]


class Bench:
    """Times forms of a computation in turn, `repeats` times after a first run that warms up."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self._rates: dict[torch.dtype, float] = {}
        self._bandwidth: float | None = None

    def compare(
        self,
        case: str,
        forms: dict[str, Callable[[], Any]],
        *,
        costs: dict[str, list[Cost]] | None = None,
        items: int | None = None,
        once: bool = False,
    ) -> list[Row]:
        """Rows of the forms, name -> what to run; gains are relative to the one named "literal".

        A run processes `items`; `costs` are the least work of a form, one after another. With `once`, the
        first run, whose memory is measured, is timed too and is the only one.
        """
        first = {name: self.first_run(form) for name, form in forms.items()}
        seconds = {name: [spent] if once else [] for name, (spent, _) in first.items()}
        for _ in range(0 if once else self.repeats):
            for name, form in forms.items():
                seconds[name].append(self.once(form))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows = []
        for name, median in medians.items():
            needed = (costs or {}).get(name, [])
            gain = medians["literal"] / median if "literal" in medians and name != "literal" else None
            floor = sum(map(self.floor, needed)) if needed else None
            operand = ", ".join(dict.fromkeys(str(c.operand).removeprefix("torch.") for c in needed))
            spread, rate = _half_quartiles(seconds[name]), items and items / median
            rows.append(Row(case, name, median, spread, first[name][1], rate, gain, floor, operand))
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

    def floor(self, cost: Cost) -> float:
        """Seconds: operations at the rate of a large product, or bytes at that of a large copy."""
        return max(cost.operations / self.rate(cost.operand), cost.bytes / self.bandwidth())

    def rate(self, operand: torch.dtype) -> float:
        """Operations per second of a large matrix product, measured once; float32 without TF32."""
        if operand not in self._rates:
            side = 8192 if self.device.type == "cuda" else 2048
            a, b = (torch.randn(side, side, device=self.device).to(operand) for _ in range(2))
            with ieee_float32():
                self._rates[operand] = 2 * side**3 / self._least(lambda: a @ b)
        return self._rates[operand]

    def bandwidth(self) -> float:
        """Bytes per second, read plus written, of a large copy, measured once."""
        if self._bandwidth is None:
            source = torch.randn(2**28 if self.device.type == "cuda" else 2**25, device=self.device)
            target = torch.empty_like(source)
            self._bandwidth = 2 * source.nbytes / self._least(lambda: target.copy_(source))
        return self._bandwidth

    def rates(self) -> dict[str, float]:
        """The measured rates, in Gop/s and GB/s."""
        rates = {f"{str(k).removeprefix('torch.')} Gop/s": v / 1e9 for k, v in self._rates.items()}
        return rates | ({} if self._bandwidth is None else {"GB/s": self._bandwidth / 1e9})

    def _least(self, form: Callable[[], Any]) -> float:
        form()
        return min(self.once(form) for _ in range(5))

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
