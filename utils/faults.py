"""Faults that reach a run from outside, in words that tell what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.errors import UserError, first_line
from utils.options import Options
from utils.ranks import planned_ranks, ranks


@contextmanager
def memory_told(options: Options) -> Iterator[None]:
    """Turns a lack of memory in the block into an error that names what to lower, and to what.

    Args:
        options: of the run.

    Raises:
        UserError: memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not lacking and "can't allocate memory" not in str(error):  # what the CPU's allocator says
            raise
        raise UserError(memory_advice(options, first_line(error))) from error


@contextmanager
def others_told() -> Iterator[None]:
    """Turns the loss of another process of the run into an error that says so.

    Raises:
        UserError: another process has ended, or has not answered.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks() == 1:
            raise
        if not (isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)):
            raise
        raise UserError(
            f"another process of this run has ended or does not answer ({first_line(error)}); its own "
            "message says why: mend that, then go on with --resume"
        ) from error


def memory_advice(options: Options, reason: str) -> str:
    """What to lower, and to what: what changes no result first."""
    batch, parts, mends = options.dataloader.batch_size, planned_ranks(options.trainer), []
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
