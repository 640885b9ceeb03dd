"""Speed relative to the literal form: python -m tests.benchmarks all

Prints a table: median and spread in milliseconds, peak memory, and the ratio to the literal form in the same
process.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from datetime import datetime, timezone

import torch

from tests.benchmarks.compute import bench_growth, bench_loss, bench_methods, bench_step
from tests.benchmarks.evaluation import bench_eval
from tests.benchmarks.inputs import SHAPES
from tests.benchmarks.measure import HEADER, Bench, Row
from tests.benchmarks.pipeline import bench_data, bench_epoch
from utils.plots.tables import markdown
from utils.training.launch import cores

CASES: dict[str, Callable[[Bench, str], list[Row]]] = {
    "loss": bench_loss,
    "growth": bench_growth,
    "step": bench_step,
    "methods": bench_methods,
    "epoch": bench_epoch,
    "eval": bench_eval,
    "data": bench_data,
}


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the named cases and prints their table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="+", choices=[*CASES, "all"], metavar="case", help=", ".join(CASES))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--shape", choices=list(SHAPES), default="cocostuff", help="whose sizes")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each form")
    arguments = parser.parse_args(argv)
    bench = Bench(torch.device(arguments.device), arguments.repeats)
    on_cuda = bench.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_cuda else platform.processor() or platform.machine()
    machine = f"{name}, {cores()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}, {datetime.now(timezone.utc).date()}, shape {arguments.shape}")
    rows: list[Row] = []
    for case in CASES if "all" in arguments.cases else dict.fromkeys(arguments.cases):
        found = CASES[case](bench, arguments.shape)
        print("\n" + markdown(HEADER, [row.cells() for row in found]), flush=True)
        rows += found
    return rows


if __name__ == "__main__":
    main()
