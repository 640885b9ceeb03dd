"""How torchrun, SLURM or Lightning launched this process, read from the environment. Imports no torch."""

import os

from utils.config.options import TrainerOptions
from utils.errors import UserError

NUMBERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_PROCID")  # set by launchers


def cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores(devices: int) -> int:
    """This process's share of the cores of a machine with `devices` processes."""
    tasks = 1 if {"RANK", "LOCAL_RANK"} & os.environ.keys() else _number("SLURM_STEP_NUM_TASKS")
    if tasks > 1 and "SLURM_CPUS_PER_TASK" in os.environ:  # srun divides the cores if it binds its tasks
        return min(cores(), _number("SLURM_CPUS_PER_TASK"))
    return max(1, cores() // devices)


def is_rank_zero() -> bool:
    """Whether this is the process that prints and writes; known before the process group exists."""
    number = {name: _number(name) for name in NUMBERS}  # all of them, as Lightning reads them too
    if "RANK" in os.environ:  # torchrun
        return number["RANK"] == 0
    if "SLURM_STEP_NUM_TASKS" in os.environ and "LOCAL_RANK" not in os.environ:  # srun
        return number["SLURM_PROCID"] == 0
    return number["NODE_RANK"] == number["LOCAL_RANK"] == 0


def started_by_lightning() -> bool:
    """Whether a main process started this one, for another device of its machine."""
    return "RANK" not in os.environ and _number("LOCAL_RANK") > 0


def _number(name: str) -> int:
    value = os.environ.get(name, "0")
    try:
        return int(value)
    except ValueError:
        fix = "unset it, or start the program with torchrun or srun, which set it"
        raise UserError(f"the environment variable {name} is {value!r}, must be a number; {fix}") from None


def check_launch(wanted: TrainerOptions) -> None:
    """Raises a UserError if torchrun or srun started a different number of processes than configured."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started = _number("WORLD_SIZE")
    elif "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        started = _number("SLURM_STEP_NUM_TASKS") or 1
    else:
        return
    if started != wanted.world_size:
        raise UserError(
            f"trainer.devices x trainer.num_nodes is {wanted.devices} x {wanted.num_nodes}, but "
            f"{started} processes were started; change the options or the number that torchrun or srun starts"
        )
