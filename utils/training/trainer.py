"""Lightning's Trainer as this project uses it: validation schedule, progress bar, checkpoints."""

import logging
import math
import signal
import sys
import warnings
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger

from utils.config.options import Options
from utils.progress import Bar
from utils.training.checkpointing import AtomicCheckpointIO
from utils.training.device import hardware_settings

BAR = "{desc} {bar} {n_fmt}/{total_fmt}, {remaining} left{postfix}"


class ValidationSteps(Callback):
    """Validates every `valid_freq` steps of an epoch, at its end and at the end of the run.

    Lightning's integer `val_check_interval` may not exceed the epoch, and skips an end it does not divide.
    """

    def __init__(self, valid_freq: int) -> None:
        self.valid_freq = valid_freq

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, _: Any, batch_idx: int) -> None:
        """Lightning validates after a batch that `val_check_batch` divides."""
        step = batch_idx + 1
        due = step % self.valid_freq == 0 or step == trainer.num_training_batches
        due = due or trainer.global_step + 1 == trainer.max_steps
        trainer.val_check_batch = step if due else math.inf


class OwnSignals(Callback):
    """Keeps the program's handler of SIGTERM in an evaluation: Lightning's waits for the other ranks."""

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs it again; during training, `StopSignal` handles signals."""
        if trainer.state.fn == "validate":
            signal.signal(signal.SIGTERM, self._handler)


class RunBar(Callback):
    """One bar for the whole run with the last logged loss, and a line for each validation."""

    def __init__(self, refresh_rate: int) -> None:
        self.refresh_rate = refresh_rate
        self._bar: Bar | None = None
        self._best = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar at the step that the run continues from."""
        total = trainer.estimated_stepping_batches
        self._bar = Bar(total=total, initial=trainer.global_step, bar_format=BAR, desc="training")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Shows loss and best score every `refresh_rate` steps; newer values would need a GPU sync."""
        step, total = trainer.global_step, self._bar.total
        if step % self.refresh_rate and step != total:
            return
        epochs = math.ceil(total / trainer.num_training_batches)
        self._bar.set_description(f"epoch {min(trainer.current_epoch + 1, epochs)}/{epochs}", refresh=False)
        loss = f"loss {pl_module.logged['total_loss']:.3f}" if pl_module.logged else ""
        self._bar.set_postfix_str(", ".join(filter(None, (loss, self._best))), refresh=False)
        self._bar.update(step - self._bar.n)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar of an evaluation; a validation during training is shown in that of the training."""
        if self._bar is None:
            self._bar = Bar(total=sum(trainer.num_val_batches), desc="evaluation", unit="batch")
        elif trainer.state.fn == "fit":
            self._bar.total = trainer.estimated_stepping_batches  # see `CheckpointManager.on_train_start`

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Counts a batch."""
        if trainer.state.fn == "validate":
            self._bar.update()
        elif sys.stderr.isatty():
            self._bar.set_description(f"validation {batch_idx + 1}/{sum(trainer.num_val_batches)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the line of a validation, or closes the bar of an evaluation."""
        if trainer.state.fn == "validate":
            self._bar.close()
            return
        metrics = pl_module.metrics
        pairs = {
            name: f"{metrics[f'{head}_Accuracy']:.1f} / {metrics[f'{head}_mIoU']:.1f}"
            for name, head in (("clusters", "Cluster"), ("linear", "Linear"))
            if f"{head}_mIoU" in metrics
        }
        words = [f"step {trainer.global_step:<6,}", *(f"{name} {pair}" for name, pair in pairs.items())]
        if pairs and pl_module.improved:
            self._best = f"best {pairs['clusters']}"
            words.append("best")
        if not pairs:  # no labels
            words.append(f"loss of the clusters {pl_module.last_evaluation.valid_loss:.3f}")
        self._bar.say("   ".join(words))
        self.on_train_batch_end(trainer, pl_module)

    def on_train_end(self, *_: Any) -> None:
        """Closes the bar, which would otherwise be written again when it is garbage-collected."""
        if self._bar is not None:
            self._bar.close()

    on_exception = on_train_end


def build_trainer(
    options: Options,
    hardware: dict[str, Any] | None = None,
    *,
    loggers: list[Logger] | None = None,
    callbacks: list[Callback] | None = None,
) -> Trainer:
    """A Trainer for a run or an evaluation; `hardware` is by default that of `hardware_settings`."""
    hardware = hardware or hardware_settings(options)
    for library in ("pytorch_lightning", "lightning_fabric", "torchmetrics"):
        logging.getLogger(library).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module=library)
    refresh_rate = options.train.print_freq if hardware["accelerator"] == "cuda" else 1
    return Trainer(
        **hardware | {"plugins": [*hardware.get("plugins", []), AtomicCheckpointIO()]},
        max_epochs=options.train.epoch,
        max_steps=options.train.max_steps or -1,
        deterministic=options.train.deterministic,
        logger=loggers or False,
        callbacks=[
            ValidationSteps(options.train.valid_freq),
            OwnSignals(),
            RunBar(refresh_rate),
            *(callbacks or []),
        ],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
