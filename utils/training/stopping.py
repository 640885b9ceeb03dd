"""Leaving a run when asked to: by Ctrl-C, by SIGTERM, or by SLURM shortly before its time is up."""

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
    """A run left as it was asked to, with all it had saved.

    Args:
        message: what was saved, and how to go on.
        signum: the signal that asked.
    """

    label = "stopped"
    common = True

    def __init__(self, message: str, *, signum: int) -> None:
        super().__init__(message)
        self.status = 128 + signum


class StopRequest:
    """Notes the first signal that asks a run to end, for the run to heed between two steps.

    SIGINT, SIGTERM, and in a SLURM job SIGUSR1 (`#SBATCH --signal=SIGUSR1@90`). A second Ctrl-C leaves at
    once. Outside the main thread, where Python takes no signals, nothing is ever asked.

    Attributes:
        signum: the signal, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = self.listen()
        return self

    def listen(self) -> dict[int, Any]:
        """Takes the signals, from whoever has them now; returns the handlers before."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        asking = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if in_slurm_job() else [])]
        return {signum: signal.signal(signum, self._asked) for signum in asking}

    def __exit__(self, *_exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _asked(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker has this handler too; its parent decides
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if self.signum is not None:
            if signum == signal.SIGINT:
                os._exit(128 + signum)
            return
        self.signum = signum
        told = "saving, then leaving; once more leaves at once"  # print could be what was interrupted
        os.write(2, f"\n{signal.Signals(signum).name}: {told}\n".encode())


def requeue() -> str:
    """Has SLURM start this job again later; returns what came of it."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"SLURM job {job} could not be requeued ({error})"
    return f"SLURM job {job} is requeued"


def command_to_go_on() -> str:
    """The command line of this program, with --resume; torchrun's own words are not known here."""
    starter = ["torchrun", "..."] if "TORCHELASTIC_RUN_ID" in os.environ else ["python"]
    words = [*starter, *sys.argv]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])
