"""One function over many images, in processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from utils.errors import UserError

CHUNK = 4  # images that a process takes at a time
# fork: a process starts at once and shares what is imported already, where spawn would import torch and
# Lightning again in each (seconds, and most of a gigabyte). It is safe while no torch operation has started
# threads; elsewhere than on Linux system libraries do not survive it.
START = "fork" if sys.platform == "linux" else "spawn"

_task: list[Any] = []  # of a worker process: the function and its first argument


def map_images(
    work: Callable[[Any, int], Any], about: Any, *, indices: Sequence[int], workers: int, title: str
) -> list[Any]:
    """`work(about, index)` for each index, in order.

    Args:
        work: a function of a module.
        about: its first argument.
        indices: its second.
        workers: number of processes; with 1 the work is done in this one.
        title: of the progress bar.

    Raises:
        UserError: a process died, or `work` raised it; the rest is not started.
    """
    described = {"total": len(indices), "desc": title, "unit": "image"}
    if min(workers, len(indices)) <= 1:
        return [work(about, index) for index in tqdm(indices, **described)]
    pool = ProcessPoolExecutor(
        min(workers, len(indices)),
        multiprocessing.get_context(START),
        initializer=_begin,
        initargs=(work, about),
    )
    try:
        results = pool.map(_work, indices, chunksize=CHUNK)  # forks before the bar starts its thread
        return list(tqdm(results, **described))
    except BrokenProcessPool:
        raise UserError(
            f"{title}: a worker process died, perhaps for want of memory (--workers is {workers}); the same "
            "command goes on, with fewer --workers if need be"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(work: Callable[[Any, int], Any], about: Any) -> None:
    _task[:] = [work, about]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's process waits for work for ever if the one that gives it is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(index: int) -> Any:
    work, about = _task
    return work(about, index)
