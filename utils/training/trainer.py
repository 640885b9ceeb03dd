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
from utils.training.checkpointing import CheckedCheckpointIO, validation_due
from utils.training.hardware import accelerator, chosen_precision
from utils.training.launch import launch_mistake

LOSS_SCALE, GROWTH_INTERVAL = 2048.0, 1000  # the published scaler


class ValidationSteps(Callback):
    """Validates every `valid_freq` steps of an epoch and at its end.

    Lightning's integer `val_check_interval` may not exceed the epoch, and skips an end that it does not divide.

    Args:
        valid_freq: in steps.
    """

    def __init__(self, valid_freq: int) -> None:
        self.valid_freq = valid_freq

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lightning validates after a batch that `val_check_batch` divides; infinity means the last one."""
        due = validation_due(batch_idx, trainer.num_training_batches, self.valid_freq)
        trainer.val_check_batch = batch_idx + 1 if due else math.inf


class RunBar(TQDMProgressBar):
    """One progress bar for all steps of a run, which names the epoch and shows the newest loss and metrics."""

    def on_train_start(self, trainer: Trainer, *_unused: Any) -> None:
        """Starts at the step that the run resumes from."""
        super().on_train_start(trainer, *_unused)
        self.train_progress_bar.reset(trainer.max_epochs * trainer.num_training_batches)
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step
        self._name_epoch(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *_unused: Any) -> None:
        """Names the epoch."""
        self._name_epoch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the steps of all epochs."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def on_exception(self, trainer: Trainer, *_unused: Any) -> None:
        """Closes the bars, which would otherwise write whenever they are garbage-collected."""
        for bar in (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        """Called at each refresh; only then is a GPU waited for."""
        shown = {"loss": pl_module.scalars["total_loss"]} if pl_module.scalars else {}
        names = ("Cluster_Accuracy", "Cluster_mIoU")
        shown |= {name: pl_module.metrics[name] for name in names if name in pl_module.metrics}
        return {name: f"{float(value):.3f}" for name, value in shown.items()}

    def _name_epoch(self, trainer: Trainer) -> None:
        epoch = min(trainer.current_epoch + 1, trainer.max_epochs)
        self.train_progress_bar.set_description(f"Epoch {epoch}/{trainer.max_epochs}", refresh=False)


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
    validates: bool = True,
) -> Trainer:
    """A Trainer for a run or an evaluation.

    Args:
        options: all options.
        hardware: from `hardware_settings`.
        loggers: where scalars go.
        callbacks: besides the progress bar and the validation schedule.
        validates: whether there are validation images.
    """
    refresh_rate = options.train.print_freq if hardware["accelerator"] == "cuda" else 1
    for library in ("pytorch_lightning", "lightning_fabric", "torchmetrics"):
        logging.getLogger(library).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module=library)
    return Trainer(
        **hardware | {"plugins": [*hardware.get("plugins", []), CheckedCheckpointIO()]},
        max_epochs=options.train.epoch,
        deterministic=options.train.deterministic,
        logger=loggers or False,
        callbacks=[ValidationSteps(options.train.valid_freq), *(callbacks or []), RunBar(refresh_rate)],
        limit_val_batches=1.0 if validates else 0,
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
