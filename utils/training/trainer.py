"""Lightning's Trainer as this project uses it: validation schedule, progress bar, checkpoints."""

import logging
import math
import warnings
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import Logger

from utils.config.options import Options
from utils.training.checkpointing import AtomicCheckpointIO


class ValidationSteps(Callback):
    """Validates every `valid_freq` steps of an epoch and at its end.

    Lightning's integer `val_check_interval` may not exceed the epoch, and skips an end it does not divide.
    """

    def __init__(self, valid_freq: int) -> None:
        self.valid_freq = valid_freq

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lightning validates after a batch that `val_check_batch` divides."""
        step = batch_idx + 1
        due = step % self.valid_freq == 0 or step == trainer.num_training_batches
        trainer.val_check_batch = step if due else math.inf


class RunBar(TQDMProgressBar):
    """Lightning's progress bar with the last logged loss and metrics."""

    def on_exception(self, *_: Any) -> None:
        """Closes the bars, which would otherwise write whenever they are garbage-collected."""
        for bar in filter(None, (self._train_progress_bar, self._val_progress_bar)):
            bar.close()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        """Loss and metrics; those of the last step would have to be waited for."""
        shown = {"loss": pl_module.logged["total_loss"]} if pl_module.logged else {}
        shown |= {name: value for name, value in pl_module.metrics.items() if name.startswith("Cluster")}
        return {name: f"{value:.3f}" for name, value in shown.items()}


def build_trainer(
    options: Options,
    hardware: dict[str, Any],
    *,
    loggers: list[Logger] | None = None,
    callbacks: list[Callback] | None = None,
) -> Trainer:
    """A Trainer for a run or an evaluation on the hardware of `hardware_settings`."""
    for library in ("pytorch_lightning", "lightning_fabric", "torchmetrics"):
        logging.getLogger(library).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module=library)
    refresh_rate = options.train.print_freq if hardware["accelerator"] == "cuda" else 1
    return Trainer(
        **hardware | {"plugins": [*hardware.get("plugins", []), AtomicCheckpointIO()]},
        max_epochs=options.train.epoch,
        deterministic=options.train.deterministic,
        logger=loggers or False,
        callbacks=[ValidationSteps(options.train.valid_freq), *(callbacks or []), RunBar(refresh_rate)],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
