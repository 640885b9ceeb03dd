"""Runs a program of the project on the null GPU: python -m tests.cuda run --opt demo.json --debug

Prints the waits, copies and kernel launches of training steps and validation batches, and the peak memory.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cuda.build import build, environment, missing


def main() -> None:
    if "nullgpu" not in os.environ.get("LD_PRELOAD", ""):
        if reason := missing():
            sys.exit(reason)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.cuda", *sys.argv[1:]]
            devices = int(os.environ.get("NULLGPU_COUNT", 1))
            done = subprocess.run(command, env=environment(build(Path(folder)), devices=devices), check=False)
        sys.exit(done.returncode)
    import torch

    from tests.cuda.trace import Trace, table
    from utils.config.cli import guarded

    trace = Trace()
    trace.install()
    status = guarded(lambda: importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
    print(table(trace.steps))
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
    sys.exit(status)


if __name__ == "__main__":
    main()
