"""Graceful shutdown on Ctrl-C, SIGTERM or SLURM's warning signal."""

import ctypes
import multiprocessing
import os
import signal
import sys
from threading import Thread
from typing import Any

from utils.errors import Interrupted, UserError

PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent ends


class Stopped(UserError):
    """Raised when a run stops on a signal, after saving."""

    label = "stopped"
    common = True

    def __init__(self, message: str, *, signum: int) -> None:
        super().__init__(message)
        self.status = 128 + signum


class StopSignal:
    """Records the first SIGINT, SIGTERM or SIGUSR1 (SLURM's warning); the run acts on it between two steps.

    From `listen` to the end of the block. A second Ctrl-C exits at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Installs the handlers and resets PyTorch's SIGCHLD handler.

        PyTorch's would raise whenever a worker is killed, even while a checkpoint is written; without it, the
        error is raised when the worker's batch is awaited.
        """
        for signum in self._before:
            signal.signal(signum, signal.SIG_DFL if signum == signal.SIGCHLD else self._handle)

    def __enter__(self) -> "StopSignal":
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
        self._before = {signum: signal.getsignal(signum) for signum in signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self.signum is not None and kind is None:  # it arrived in the last step
            raise Interrupted(128 + self.signum)

    def _handle(self, signum: int, _frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a DataLoader worker, which inherits the handler
        if self.signum is None:
            self.signum = signum
            name = signal.Signals(signum).name  # print is not reentrant
            os.write(2, f"\n{name}: saving before exit; press Ctrl-C to exit at once\n".encode())
        elif signum == signal.SIGINT:
            os._exit(128 + signum)


def end_with_parent() -> None:
    """Makes this process end with the one that started it, even while a library holds Python's lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def follow_main_process(*_: Any) -> None:
    """Ties a worker's lifetime to the main process: a step in progress needs its workers.

    In a process group of its own, it does not get signals to that of the main process, such as Ctrl-C.
    """
    os.setpgid(0, 0)
    end_with_parent()
    # also on other systems, and if the main process ended before this
    Thread(target=_exit_after_main_process, daemon=True).start()


def worker_settings(workers: int) -> dict[str, Any]:
    """A DataLoader's arguments for its workers, which are forked on Linux.

    Python 3.14 would start them anew: they would import torch again, and could not import a plugin.
    """
    context = "fork" if workers and sys.platform == "linux" else None
    return {"num_workers": workers, "worker_init_fn": follow_main_process, "multiprocessing_context": context}


def worker_was_killed(error: BaseException) -> bool:
    """Whether an error comes from a DataLoader worker that was killed, or from the pipe it wrote to."""
    words = ("DataLoader worker (pid", "shared memory", "Pin memory thread exited")
    return any(part in str(error) for part in words) or isinstance(error, (ConnectionError, EOFError))


def _exit_after_main_process() -> None:
    multiprocessing.parent_process().join()  # waits on a pipe that closes with it
    os._exit(0)
