"""The processes (ranks) that a run is spread over: which one this is, and which part of the work is its own.

torchrun, SLURM or Lightning starts them, one for each device; each runs the same program. What needs torch is
imported inside functions: the command line is read before torch is there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from utils.options import TrainerOptions
from utils.stopping import in_slurm_job

Rows = TypeVar("Rows", bound=Sequence)


def is_first() -> bool:
    """Whether this is the process that prints and writes; known before they have found each other."""
    return set(place()) == {0}


def place() -> tuple[int, ...]:
    """What the starter calls this process: its rank, or that of its machine and its own there."""
    if "RANK" in os.environ:  # torchrun
        return (int(os.environ["RANK"]),)
    if "SLURM_STEP_NUM_TASKS" in os.environ and "LOCAL_RANK" not in os.environ:  # srun
        return (int(os.environ.get("SLURM_PROCID", "0")),)
    return tuple(int(os.environ.get(name, "0")) for name in ("NODE_RANK", "LOCAL_RANK"))


def rank() -> int:
    """The place of this process among `ranks()`, from 0."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks() -> int:
    """How many processes there are, once they have found each other; 1 before."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_slice(rows: Rows) -> Rows:
    """This rank's contiguous part of a global batch; its size is a multiple of `ranks()`."""
    each = len(rows) // ranks()
    return rows[rank() * each : (rank() + 1) * each]


def from_all(value: Any) -> list[Any]:
    """What each rank gives, by rank; to be called by all. Tensors in it are to lie on the CPU."""
    import torch.distributed as dist

    found = [value] * ranks()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def planned_ranks(wanted: TrainerOptions) -> int:
    """How many processes the options ask for."""
    return wanted.devices * wanted.num_nodes


def launch_mistake(wanted: TrainerOptions) -> str | None:
    """What to change where torchrun or srun has started other processes than the options ask for, or None."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        starter, started = "torchrun", os.environ["WORLD_SIZE"]
        nodes = int(started) // int(os.environ["LOCAL_WORLD_SIZE"])
    elif in_slurm_job():
        starter, started = "srun", os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    else:
        return None
    each = int(started) // nodes
    if (each, nodes) == (wanted.devices, wanted.num_nodes):
        return None
    asked = f"trainer.devices x trainer.num_nodes is {wanted.devices} x {wanted.num_nodes}"
    if (starter, started) == ("srun", "1"):
        return (
            f"{asked}, but this is the only task: in a SLURM job, start the program with srun "
            f"--nodes={wanted.num_nodes} --ntasks-per-node={wanted.devices}"
        )
    mend = f"set trainer.devices={each} trainer.num_nodes={nodes}"
    return f"{asked}, but {starter} has started {each} x {nodes} processes: {mend}"
