"""Lightning's Trainer as this project uses it: device, precision, checkpoints, when to validate."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.precision import MixedPrecision

from utils.config.options import Options
from utils.errors import UserError
from utils.training.checkpointing import WholeCheckpoints
from utils.training.hardware import accelerator, chosen_precision
from utils.training.launch import launch_mistake
from utils.training.schedule import Schedule

LOSS_SCALE, GROWTH_INTERVAL = 2048.0, 1000  # the published scaler


class ValidationSteps(Callback):
    """Validates after the steps that the schedule says.

    Args:
        schedule: of all steps.
        done: steps that are left out at the start.
    """

    def __init__(self, schedule: Schedule, *, done: int = 0) -> None:
        self.schedule, self.done = schedule, done

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """`val_check_batch` is compared with the batch in hand; infinity leaves the last batch alone."""
        due = self.schedule.validates(self.done + batch_idx + 1)
        trainer.val_check_batch = batch_idx + 1 if due else math.inf


class RunBar(TQDMProgressBar):
    """One bar for all steps of a run, which names the epoch.

    Args:
        schedule: of all steps; None for an evaluation.
        done: steps that are left out at the start.
        refresh_rate: batches from one refresh to the next.
    """

    def __init__(self, schedule: Schedule | None, *, done: int, refresh_rate: int) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.schedule, self.done = schedule, done

    def on_train_epoch_start(self, trainer: Trainer, *_unused: Any) -> None:
        """Begins where an earlier start has stopped; Lightning's one epoch is the whole run."""
        self.train_progress_bar.reset(self.schedule.total)
        self.train_progress_bar.initial = self.train_progress_bar.n = self.done
        self._name_epoch(self.done + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts on from there."""
        step = self.done + batch_idx + 1
        self._name_epoch(step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, step - 1)

    def on_exception(self, trainer: Trainer, *_unused: Any) -> None:
        """Closes the bars, which would otherwise write when they are collected.

        That may be in the midst of anything: where wandb listens to what is written, setting its context
        variable from there breaks those of Python before 3.12 (python/cpython#148891).
        """
        for bar in (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()

    def _name_epoch(self, step: int) -> None:
        epoch = min(self.schedule.epoch(step) + 1, self.schedule.epochs)
        self.train_progress_bar.set_description(f"Epoch {epoch}/{self.schedule.epochs}", refresh=False)


def hardware_settings(options: Options) -> dict[str, Any]:
    """What the Trainer needs to know of device and precision; asked for before anything is written.

    Raises:
        UserError: `gpu_ids`, `trainer.*` or `train.precision` do not fit this machine.
    """
    device = device_settings(options)
    return device | precision_settings(options, device["accelerator"])


def device_settings(options: Options) -> dict[str, Any]:
    """Accelerator, devices and how they work together: CUDA, else Apple MPS, else the CPU.

    Raises:
        UserError: `gpu_ids` or `trainer.*` ask for what is not there, or for other processes than were
            started.
    """
    wanted = options.trainer
    if mistake := launch_mistake(wanted):
        raise UserError(mistake)
    spread = {"num_nodes": wanted.num_nodes, "strategy": wanted.strategy}
    found = accelerator()
    if found == "cuda":
        return {"accelerator": "cuda", "devices": cuda_devices(options), **spread}
    if found == "mps" and wanted.devices > 1:
        raise UserError(f"trainer.devices is {wanted.devices}, must be 1 on mps, which is one device")
    print(f"device: {found} (no CUDA device; gpu_ids {options.gpu_ids} ignored)")
    return {"accelerator": found, "devices": wanted.devices, **spread}


def cuda_devices(options: Options) -> list[int]:
    """The devices of this machine that `gpu_ids` and `trainer.devices` ask for.

    Raises:
        UserError: they do not fit together, or such devices are not there.
    """
    wanted, there = options.trainer.devices, torch.cuda.device_count()
    if wanted > there:
        raise UserError(f"trainer.devices is {wanted}, must be at most {there}, the CUDA devices here")
    chosen = list(range(wanted)) if options.gpu_ids == [0] else options.gpu_ids
    if len(set(chosen)) != wanted or len(chosen) != wanted or not all(0 <= each < there for each in chosen):
        how_many = "one device" if wanted == 1 else f"{wanted} devices (trainer.devices)"
        raise UserError(f"gpu_ids is {chosen}, must be {how_many} from 0 to {there - 1} on this machine")
    return list(chosen)


def precision_settings(options: Options, accelerator: str) -> dict[str, Any]:
    """Autocast as `train.precision` says; float16 with the published loss scale.

    Several processes scale their loss by their number, for DDP takes the mean of their gradients; so
    activations see the gradients of a single process.

    Raises:
        UserError: float16 without CUDA.
    """
    chosen = chosen_precision(options, accelerator)
    if chosen == "fp16":
        scale = LOSS_SCALE / options.trainer.world_size
        scaler = torch.amp.GradScaler("cuda", init_scale=scale, growth_interval=GROWTH_INTERVAL)
        return {"plugins": [MixedPrecision("16-mixed", "cuda", scaler=scaler)]}
    return {"precision": {"bf16": "bf16-mixed", "fp32": "32-true"}[chosen]}


def check_backends(options: Options) -> None:
    """Whether loss and CRF can be computed as the options say on this machine, before anything is run.

    Raises:
        UserError: Triton is not installed, or the device is none of its; or no CRF in torch on Apple MPS.
    """
    mistakes = []
    if options.eval.is_crf and options.eval.crf_backend == "torch" and accelerator() == "mps":
        mistakes.append("eval.crf_backend is torch, must be pydensecrf on mps, which lacks an operation")
    if mistakes:
        raise UserError(mistakes)


def build_trainer(
    options: Options,
    hardware: dict[str, Any],
    *,
    loggers: list[Logger] | None = None,
    callbacks: list[Callback] | None = None,
    validate: bool = True,
    schedule: Schedule | None = None,
    done: int = 0,
) -> Trainer:
    """A Trainer for a run, or with no schedule for an evaluation.

    A run is one epoch to Lightning, so that it may begin at any step.

    Args:
        options: all options.
        hardware: from `hardware_settings`.
        loggers: where scalars go.
        callbacks: beside the progress bar.
        validate: whether there are validation images.
        schedule: of all steps.
        done: steps that are left out at the start.
    """
    # each refresh waits for the device
    refresh = options.train.print_freq if hardware["accelerator"] == "cuda" else 1
    for library in ("pytorch_lightning", "lightning_fabric", "torchmetrics"):
        logging.getLogger(library).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module=library)
    steps = [ValidationSteps(schedule, done=done)] if schedule is not None else []
    bar = RunBar(schedule, done=done, refresh_rate=refresh)
    plugins = [*hardware.get("plugins", []), WholeCheckpoints()]
    return Trainer(
        **hardware | {"plugins": plugins},
        max_epochs=1,
        deterministic=options.train.deterministic,
        logger=loggers or False,
        callbacks=[*steps, *(callbacks or []), bar],
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


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
