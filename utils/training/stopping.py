"""Graceful shutdown on Ctrl-C, SIGTERM or SLURM's warning signal."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

from utils.errors import UserError
from utils.training.launch import in_slurm_job


class Stopped(UserError):
    """Raised when a run stops on a signal, after saving."""

    label = "stopped"
    common = True

    def __init__(self, message: str, *, signum: int) -> None:
        super().__init__(message)
        self.status = 128 + signum


class StopSignal:
    """Records the first SIGINT, SIGTERM or, in a SLURM job, SIGUSR1; the run acts on it between two steps.

    A second Ctrl-C exits at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def listen(self) -> dict[int, Any]:
        """Installs the handlers; returns the previous ones."""
        signals = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if in_slurm_job() else [])]
        return {signum: signal.signal(signum, self._handle) for signum in signals}

    def __enter__(self) -> StopSignal:
        self._before = self.listen()
        return self

    def __exit__(self, *_exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a DataLoader worker, which inherits the handler
        if self.signum is None:
            self.signum = signum
            name = signal.Signals(signum).name  # print is not reentrant
            os.write(2, f"\n{name}: saving before exit; press Ctrl-C to exit at once\n".encode())
        elif signum == signal.SIGINT:
            os._exit(128 + signum)


def requeue() -> str:
    """Asks SLURM to requeue this job; returns a message about the outcome."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"SLURM job {job} could not be requeued ({error})"
    return f"SLURM job {job} is requeued"
