"""Lightning's Trainer as this project uses it: device, precision, checkpoints, when to validate."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.precision import MixedPrecision

from utils.errors import UserError
from utils.hardware import accelerator, chosen_precision
from utils.options import Options

LOSS_SCALE, GROWTH_INTERVAL = 2048.0, 1000  # the published scaler
LEAST_TRITON = (3, 3)  # the interpreter of 3.2 crashes on the kernels


class ValidationSteps(Callback):
    """Validates after batch i of an epoch (from 1) where i is a multiple of `every`, and after the last.

    Lightning's own val_check_interval leaves out an epoch's last batch unless it is a multiple.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """`val_check_batch` is compared with the batch in hand; infinity leaves the last batch alone."""
        due = (batch_idx + 1) % self.every == 0
        trainer.val_check_batch = batch_idx + 1 if due else math.inf


def hardware_settings(options: Options) -> dict[str, Any]:
    """What the Trainer needs to know of device and precision; asked for before anything is written.

    Raises:
        UserError: `gpu_ids` or `train.precision` do not fit this machine.
    """
    device = device_settings(options)
    return device | precision_settings(options, device["accelerator"])


def device_settings(options: Options) -> dict[str, Any]:
    """Accelerator and devices: CUDA, else Apple MPS, else the CPU.

    Raises:
        UserError: `gpu_ids` is not one device that is there.
    """
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if len(options.gpu_ids) != 1 or not 0 <= options.gpu_ids[0] < count:
            raise UserError(
                f"gpu_ids is {options.gpu_ids}, must be one device from 0 to {count - 1} on this machine"
            )
        return {"accelerator": "cuda", "devices": list(options.gpu_ids)}
    found = accelerator()
    print(f"device: {found} (no CUDA device; gpu_ids {options.gpu_ids} ignored)")
    return {"accelerator": found, "devices": 1}


def precision_settings(options: Options, accelerator: str) -> dict[str, Any]:
    """Autocast as `train.precision` says; float16 with the published loss scale.

    Raises:
        UserError: float16 without CUDA.
    """
    chosen = chosen_precision(options, accelerator)
    if chosen == "fp16":
        scaler = torch.amp.GradScaler("cuda", init_scale=LOSS_SCALE, growth_interval=GROWTH_INTERVAL)
        return {"plugins": [MixedPrecision("16-mixed", "cuda", scaler=scaler)]}
    return {"precision": {"bf16": "bf16-mixed", "fp32": "32-true"}[chosen]}


def check_backends(options: Options) -> None:
    """Whether loss and CRF can be computed as the options say on this machine, before anything is run.

    Raises:
        UserError: Triton is not installed, or the device is none of its; or no CRF in torch on Apple MPS.
    """
    cuda, interpreted = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
    mistakes = []
    if options.training_coeff.backend == "triton":
        found = _triton_version()
        if found is None or found < LEAST_TRITON:
            least = ".".join(map(str, LEAST_TRITON))
            mistakes.append(
                f"training_coeff.backend is triton, which is missing or older than {least}: install it "
                "(newer torch brings it), or take torch"
            )
        elif cuda == interpreted:
            mend = "unset TRITON_INTERPRET" if cuda else "set it to torch"
            mistakes.append(
                f"training_coeff.backend is triton, which needs CUDA and compiled kernels: {mend}"
            )
    if options.eval.is_crf and options.eval.crf_backend == "torch" and accelerator() == "mps":
        mistakes.append("eval.crf_backend is torch, must be pydensecrf on mps, which lacks an operation")
    if mistakes:
        raise UserError(mistakes)


def _triton_version() -> tuple[int, ...] | None:
    try:
        import triton
    except ImportError:
        return None
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def build_trainer(
    options: Options,
    hardware: dict[str, Any],
    *,
    loggers: list[Logger] | None = None,
    callbacks: list[Callback] | None = None,
    validate: bool = True,
) -> Trainer:
    """A Trainer for a run, or with no loggers and callbacks for an evaluation.

    Args:
        options: all options.
        hardware: from `hardware_settings`.
        loggers: where scalars go.
        callbacks: beside the progress bar.
        validate: whether there are validation images.
    """
    # each refresh waits for the device
    refresh = options.train.print_freq if hardware["accelerator"] == "cuda" else 1
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for library in ("pytorch_lightning", "lightning_fabric", "torchmetrics"):
        warnings.filterwarnings("ignore", module=library)
    return Trainer(
        **hardware,
        max_epochs=options.train.epoch,
        logger=loggers or False,
        callbacks=[*(callbacks or []), TQDMProgressBar(refresh_rate=refresh)],
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks or []),
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


@dataclass(frozen=True)
class Keepers:
    """Who writes best.ckpt, the largest `score`, and last.ckpt; the same where nothing is validated."""

    best: ModelCheckpoint
    last: ModelCheckpoint


def checkpoint_keepers(folder: Path, *, validated: bool) -> Keepers:
    """Both callbacks; without a validation an epoch's end saves, and best.ckpt is the newest.

    Args:
        folder: of the run.
        validated: whether validation runs at all.
    """

    def keeper(filename: str, monitor: str | None) -> ModelCheckpoint:
        return ModelCheckpoint(
            dirpath=folder,
            filename=filename,
            monitor=monitor,
            mode="max",
            save_top_k=1,
            enable_version_counter=False,
            save_on_train_epoch_end=not validated,
        )

    best = keeper("best", "score" if validated else None)
    return Keepers(best, keeper("last", None) if validated else best)


def reset_peak_memory() -> None:
    """Starts the GPU's peak afresh."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """Peak memory in GiB: of the GPU since `reset_peak_memory`, else of this process since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
