"""Time, memory and the floor that the hardware sets, all measured in the process that is measured."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loss import ieee_float32

MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What a computation cannot do without.

    Attributes:
        operations: floating-point operations of its matrix products, an addition and a product being two.
        bytes: that it reads and writes at least, each input and output once.
        operand: type of the products' operands.
    """

    operations: float
    bytes: float
    operand: torch.dtype = torch.float32


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        case: name of the benchmark.
        form: what was timed.
        seconds: median.
        spread: half the distance between the quartiles, in seconds.
        peak_mib: memory at its highest beyond what was held before; NaN where it cannot be known.
        items: per second, where items are what counts.
        gain: seconds of the literal form over these, or None.
        floor: seconds that the operations or the bytes take at the measured rates, or None.
        operand: types that the floor is measured in.
    """

    case: str
    form: str
    seconds: float
    spread: float
    peak_mib: float
    items: float | None = None
    gain: float | None = None
    floor: float | None = None
    operand: str = ""

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


HEADER = [
    "",
    "ms",
    "peak MiB",
    "items/s",
    "x literal",
    "floor ms",
    "x floor",
    "operands",
]


class Bench:
    """Times forms of the same computation in turn, so that what else the machine does falls on all alike.

    Args:
        device: where they run.
        repeats: times that each is run, after one that does not count.
    """

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
        repeats: int | None = None,
    ) -> list[Row]:
        """Rows of all forms; the one named "literal" is what the others are held against.

        Args:
            case: name of the benchmark.
            forms: name -> what to run.
            costs: name -> what that form cannot do without, for its floor; one after another.
            items: that one run deals with.
            repeats: timed runs of each form; None: as many as of any; 0: the one that peak memory is taken
                from, which otherwise warms up.
        """
        first = {name: self.first_run(form) for name, form in forms.items()}
        seconds = {name: [] if repeats != 0 else [spent] for name, (spent, _) in first.items()}
        for _ in range(self.repeats if repeats is None else repeats):
            for name, form in forms.items():
                seconds[name].append(self.once(form))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows = []
        for name, median in medians.items():
            needed = (costs or {}).get(name, [])
            literal = medians.get("literal") if name != "literal" else None
            rows.append(
                Row(
                    case,
                    name,
                    median,
                    _half_quartiles(seconds[name]),
                    first[name][1],
                    items=None if items is None else items / median,
                    gain=None if literal is None else literal / median,
                    floor=sum(map(self.floor, needed)) if needed else None,
                    operand=", ".join(dict.fromkeys(str(c.operand).removeprefix("torch.") for c in needed)),
                )
            )
        return rows

    def once(self, form: Callable[[], Any]) -> float:
        """Seconds of one run, the device's work included."""
        self._wait()
        start = time.perf_counter()
        form()
        self._wait()
        return time.perf_counter() - start

    def first_run(self, form: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of one run, and MiB that it holds at its highest beyond what was held before.

        The latter is NaN where it cannot be known.
        """
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds = self.once(form)
            return seconds, (torch.cuda.max_memory_allocated() - before) / MIB
        before = _resident_from_now_on()
        seconds = self.once(form)
        return seconds, (_status("VmHWM") - before) / MIB

    def floor(self, cost: Cost) -> float:
        """Seconds: operations at the rate of a large product, or bytes at that of a large copy."""
        return max(cost.operations / self.rate(cost.operand), cost.bytes / self.bandwidth())

    def rate(self, operand: torch.dtype) -> float:
        """Operations a second of a large matrix product, measured once; float32 without TF32."""
        if operand not in self._rates:
            side = 8192 if self.device.type == "cuda" else 2048
            a, b = (torch.randn(side, side, device=self.device).to(operand) for _ in range(2))
            with ieee_float32():
                self._rates[operand] = 2 * side**3 / self._least(lambda: a @ b)
        return self._rates[operand]

    def bandwidth(self) -> float:
        """Bytes a second, read plus written, of a large copy, measured once."""
        if self._bandwidth is None:
            source = torch.randn(2**28 if self.device.type == "cuda" else 2**25, device=self.device)
            target = torch.empty_like(source)
            self._bandwidth = 2 * source.nbytes / self._least(lambda: target.copy_(source))
        return self._bandwidth

    def about(self) -> dict[str, float]:
        """The rates that were measured, in Gop/s and GB/s."""
        rates = {f"{str(k).removeprefix('torch.')} Gop/s": v / 1e9 for k, v in self._rates.items()}
        return rates | ({} if self._bandwidth is None else {"GB/s": self._bandwidth / 1e9})

    def _least(self, form: Callable[[], Any]) -> float:
        form()
        return min(self.once(form) for _ in range(max(5, self.repeats)))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows in plain containers."""
    return [asdict(row) for row in rows]


def _half_quartiles(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def _status(field: str) -> float:
    """Bytes of a field of Linux's account of this process; NaN elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    return next((2**10 * float(line.split()[1]) for line in lines if line.startswith(field)), float("nan"))


def _resident_from_now_on() -> float:
    """Bytes held now; the highest that Linux keeps account of starts here again."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier run has freed
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return _status("VmRSS")
