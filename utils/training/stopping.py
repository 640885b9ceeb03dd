"""Graceful shutdown on Ctrl-C, SIGTERM or SLURM's warning signal."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

from utils.errors import UserError
from utils.training.launch import in_slurm_job


class Stopped(UserError):
    """The run stopped on request, with everything saved.

    Args:
        message: what was saved, and how to resume.
        signum: the signal that asked.
    """

    label = "stopped"
    common = True

    def __init__(self, message: str, *, signum: int) -> None:
        super().__init__(message)
        self.status = 128 + signum


class StopSignal:
    """Notes the first SIGINT, SIGTERM or, in a SLURM job, SIGUSR1; the run acts on it between two steps.

    A second Ctrl-C exits at once. Outside the main thread, where Python handles no signals, nothing is noted.

    Attributes:
        signum: the signal, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = self.listen()
        return self

    def listen(self) -> dict[int, Any]:
        """Installs the handlers; returns the previous ones."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        signals = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if in_slurm_job() else [])]
        return {signum: signal.signal(signum, self._handle) for signum in signals}

    def __exit__(self, *_exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's process inherits this handler
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if self.signum is not None:
            if signum == signal.SIGINT:
                os._exit(128 + signum)
            return
        self.signum = signum
        message = "saving before exit; press Ctrl-C to exit at once"
        os.write(2, f"\n{signal.Signals(signum).name}: {message}\n".encode())  # print is not reentrant


def requeue() -> str:
    """Asks SLURM to start this job again later; returns a line on the outcome."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"SLURM job {job} could not be requeued ({error})"
    return f"SLURM job {job} is requeued"


def resume_command() -> str:
    """The command line of this program with --resume; torchrun's own flags are unknown here."""
    launcher = ["torchrun", "..."] if "TORCHELASTIC_RUN_ID" in os.environ else ["python"]
    words = [*launcher, *sys.argv]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])
