"""Device and precision of a run, and actionable messages for exhausted memory."""

import resource
import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor
from torch.distributed import DistError

from utils.config.options import Options
from utils.errors import UserError, first_line, stdout_is_lost
from utils.training.distributed import world_size
from utils.training.launch import check_launch
from utils.training.stopping import worker_was_killed

LOSS_SCALE, GROWTH_INTERVAL = 2048.0, 1000  # as published


def accelerator() -> str:
    """CUDA, else Apple MPS, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_settings(options: Options) -> dict[str, Any]:
    """The Trainer's accelerator, devices, nodes and strategy, checked against machine and launcher."""
    wanted, found = options.trainer, accelerator()
    check_launch(wanted)
    devices: int | list[int] = wanted.devices
    if found == "cuda":
        available, devices = torch.cuda.device_count(), list(options.gpu_ids)
        if devices == [0]:
            devices = list(range(wanted.devices))
        if len(set(devices)) != wanted.devices or not set(devices) <= set(range(available)):
            raise UserError(
                f"gpu_ids is {list(options.gpu_ids)}, must be {wanted.devices} (trainer.devices) different "
                f"CUDA devices of the {available} on this machine, numbered from 0"
            )
    nodes, strategy = wanted.num_nodes, wanted.strategy
    return {"accelerator": found, "devices": devices, "num_nodes": nodes, "strategy": strategy}


def hardware_settings(options: Options) -> dict[str, Any]:
    """The Trainer's arguments for device and precision."""
    device = device_settings(options)
    return device | precision_settings(options, device["accelerator"])


def device_name(options: Options) -> str:
    """The first device of `device_settings`, as torch names it."""
    found = device_settings(options)
    return f"cuda:{found['devices'][0]}" if found["accelerator"] == "cuda" else found["accelerator"]


def chosen_precision(options: Options, accelerator: str) -> str:
    """Resolves `train.precision` on a device: "fp16", "bf16" or "fp32"."""
    chosen = options.train.precision
    if chosen == "auto":
        return "fp16" if accelerator == "cuda" else "fp32"
    if chosen == "fp16" and accelerator != "cuda":
        raise UserError(f"train.precision is fp16, must be auto, fp32 or bf16 on {accelerator}")
    return chosen


def precision_settings(options: Options, accelerator: str) -> dict[str, Any]:
    """The Trainer's argument for `train.precision`; float16 with the published loss scale.

    The module multiplies the loss by the number of processes, because DDP averages gradients; the scale is
    divided by it, so that activations see the gradients of a single process.
    """
    chosen = chosen_precision(options, accelerator)
    if chosen == "fp16":
        scale = LOSS_SCALE / options.trainer.world_size
        scaler = torch.amp.GradScaler("cuda", init_scale=scale, growth_interval=GROWTH_INTERVAL)
        return {"plugins": [MixedPrecision("16-mixed", "cuda", scaler=scaler)]}
    return {"precision": {"bf16": "bf16-mixed", "fp32": "32-true"}[chosen]}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports exhausted memory of a GPU or of this machine."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def explained_errors() -> Iterator[None]:
    """Converts exhausted memory, killed workers and lost processes to a UserError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError, ConnectionError, EOFError) as error:
        reason = first_line(error)
        if is_out_of_memory(error):
            raise UserError(
                f"out of memory ({reason}); lower dataloader.val_batch_size, training_coeff.chunk_size or "
                "dataloader.batch_size (which affects the result), or set dataset.cache_features=disk"
            ) from error
        if isinstance(error, BrokenPipeError) and stdout_is_lost():
            raise
        if world_size() > 1 and (isinstance(error, DistError) or "gloo" in reason):
            raise UserError(
                f"another process of this run has ended ({reason}); its own message says why, if it was not "
                "killed, usually because memory is full; then rerun with --resume"
            ) from error
        if isinstance(error, BrokenExecutor) or worker_was_killed(error):
            raise UserError(
                f"a worker process was killed ({reason}), usually because memory or /dev/shm is full; lower "
                "dataloader.num_workers or eval.crf_workers, or enlarge /dev/shm (docker run --shm-size)"
            ) from error
        raise


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device, to CUDA without waiting for it."""
    cuda = device.type == "cuda"  # MPS may read the tensor after it was freed
    return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)


def reset_peak_memory() -> None:
    """Resets the peak memory of all GPUs; before CUDA starts there is none, and PyTorch would fail."""
    if torch.cuda.is_initialized():
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)


def peak_memory_gib() -> float:
    """Peak memory in GiB: on the GPU since `reset_peak_memory`, or of this process since its start."""
    if torch.cuda.is_available():
        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
