"""Faults that reach a run from outside, in words that tell what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.config.options import Options
from utils.errors import UserError, first_line
from utils.training.distributed import world_size


@contextmanager
def faults_told(options: Options) -> Iterator[None]:
    """Turns faults of the machine in the block into errors that tell what to change.

    Args:
        options: of the run.

    Raises:
        UserError: memory has run out, or a process that loads images or trains beside this one has ended.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = told_of(error, options)
        if message is None:
            raise
        raise UserError(message) from error


def told_of(error: BaseException, options: Options) -> str | None:
    """What to change where an error is a fault of the machine; None where it is not."""
    reason = first_line(error)
    # what the CPU's allocator says
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in reason:
        return memory_advice(options, reason)
    if lost_loader(error):
        workers = options.dataloader.num_workers
        return (
            f"a process that loads images has ended ({reason}), as where memory or /dev/shm runs out; set "
            f"dataloader.num_workers={workers // 2} (now {workers}), enlarge them (docker run --shm-size); "
            "then go on with --resume"
        )
    distributed = isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
    if world_size() > 1 and distributed:
        return (
            f"another process of this run has ended or does not answer ({reason}); its own message says "
            "why: mend that, then go on with --resume"
        )
    return None


def lost_loader(error: BaseException) -> bool:
    """Whether a loader's process has ended or lacks shared memory: the data stops, between two steps."""
    words = ("DataLoader worker (pid", "shared memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def memory_advice(options: Options, reason: str) -> str:
    """What to lower, and to what: what changes no result first."""
    batch, parts, mends = options.dataloader.batch_size, options.trainer.world_size, []
    if options.dataset.cache_features == "ram":
        mends.append("dataset.cache_features=disk (now ram)")
    if (size := options.dataloader.val_batch_size) > 1:
        mends.append(f"dataloader.val_batch_size={size // 2} (now {size}; changes no result)")
    if (chunk := options.training_coeff.chunk_size) != 1:
        now = "chosen by device" if chunk is None else chunk
        mends.append(f"training_coeff.chunk_size={(chunk or 256) // 2} (now {now}; changes no result)")
    if batch > parts:
        fewer = batch // 2 // parts * parts or parts
        mends.append(f"dataloader.batch_size={fewer} (now {batch}; the loss sees fewer patches)")
    if options.train.precision == "fp32":
        mends.append("train.precision=bf16 (now fp32)")
    return f"out of memory ({reason}). Try, in this order: {'; '.join(mends) or 'a smaller dataset.res'}"
