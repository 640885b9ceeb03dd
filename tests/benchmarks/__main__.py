"""Speed against the literal form and against the hardware: python -m tests.benchmarks all

One table: median and spread in milliseconds, peak memory, the ratio to the literal form in the same process,
and the ratio to the floor that measured rates of products and copies set.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from tests.benchmarks.compute import bench_growth, bench_loss, bench_step
from tests.benchmarks.evaluation import bench_crf, bench_eval
from tests.benchmarks.inputs import SHAPES
from tests.benchmarks.measure import HEADER, Bench, Row, as_json
from tests.benchmarks.pipeline import bench_data, bench_epoch
from utils.files import write_json
from utils.plots.tables import markdown
from utils.training.launch import cores

CASES: dict[str, Callable[[Bench, str], list[Row]]] = {
    "loss": bench_loss,
    "growth": bench_growth,
    "step": bench_step,
    "epoch": bench_epoch,
    "eval": bench_eval,
    "crf": bench_crf,
    "data": bench_data,
}


def hardware(device: torch.device) -> str:
    """What the numbers belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    date = datetime.now(timezone.utc).date()
    return f"{name}, {cores()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, {date}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the cases that are named and prints their table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="+", choices=[*CASES, "all"], metavar="case", help=", ".join(CASES))
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="cocostuff", help="whose sizes")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each form")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but there is no CUDA device here: take cpu")
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}, must be at least 1")
    bench = Bench(torch.device(arguments.device), arguments.repeats)
    about = hardware(bench.device)
    print(f"{about}, shape {arguments.shape}")
    rows: list[Row] = []
    for name in CASES if "all" in arguments.cases else dict.fromkeys(arguments.cases):
        found = CASES[name](bench, arguments.shape)
        print("\n" + markdown(HEADER, [row.cells() for row in found]), flush=True)
        rows += found
        if arguments.json is not None:  # each time: a run that is cut short loses nothing
            content = {
                "hardware": about,
                "shape": arguments.shape,
                "rates": bench.about(),
                "rows": as_json(rows),
            }
            write_json(arguments.json, content)
    print("\n" + json.dumps({key: round(value, 1) for key, value in bench.about().items()}))
    return rows


if __name__ == "__main__":
    main()
