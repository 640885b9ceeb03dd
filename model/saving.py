"""When a run saves itself, and when it leaves."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer

from model.module import PPAPModule
from utils.errors import NotFinite, UserError
from utils.training.checkpointing import BEST, LAST, NEWEST, PROGRESS, Progress, copy_whole, shift_names
from utils.training.faults import lost_loader
from utils.training.launch import in_slurm_job
from utils.training.loggers import wandb_runs
from utils.training.randomness import random_states, set_random_states
from utils.training.schedule import Schedule
from utils.training.stopping import Stopped, StopRequest, command_to_go_on, requeue


class Saver(Callback):
    """Keeps best.ckpt (largest sum of metrics), last.ckpt and, before it, previous.ckpt.

    Saves after each validation, or where nothing is validated after each epoch (best.ckpt is the newest
    then), and every `train.checkpoint_every` in between; also when a signal asks the run to leave, or a
    mistake outside the program ends it. What is saved stands between two steps, so that a run which goes on
    from it computes what it would have computed.

    Args:
        folder: of the run.
        schedule: of its steps.
        every: `train.checkpoint_interval`.
        validated: whether there are validation images.
        stop: what notes signals.
        progress: what the run goes on from.
    """

    def __init__(
        self,
        folder: Path,
        schedule: Schedule,
        *,
        every: tuple[int | None, float | None],
        validated: bool,
        stop: StopRequest,
        progress: Progress,
    ) -> None:
        self.folder, self.schedule, self.validated, self.stop = folder, schedule, validated, stop
        self.steps, self.seconds = every
        self.best = progress.best
        self._from, self._at = progress, progress  # where it started, and where it is
        self._began = self._saved = time.perf_counter()
        self._saved_step = progress.step

    @property
    def spent(self) -> float:
        """Seconds of training, those before a resumption too."""
        return self._from.seconds + time.perf_counter() - self._began

    def on_train_start(self, trainer: Trainer, pl_module: PPAPModule) -> None:
        """Takes the signals that Lightning has just taken, and puts the random generators where they were."""
        self.stop.listen()
        if self._from.random:
            set_random_states(self._from.random)

    def on_train_batch_start(self, trainer: Trainer, pl_module: PPAPModule, *_batch: Any) -> None:
        """All of the step before is done: saves where that is due, and leaves where that was asked for."""
        asked = self._asked(trainer)
        if asked or self._due(trainer):
            self._save(trainer)
        if asked:
            self._leave(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: PPAPModule, *_batch: Any) -> None:
        """Notes the step, and whether a validation is to follow."""
        step = pl_module.iters
        self._at = Progress(step, validated=not (self.validated and self.schedule.validates(step)))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: PPAPModule, *_batch: Any) -> None:
        """Leaves a validation half done where that was asked for; it is begun anew later."""
        if trainer.state.fn == "fit" and self._asked(trainer):
            self._save(trainer)
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: PPAPModule) -> None:
        """Saves, and keeps the best."""
        self._at = Progress(pl_module.iters)
        improved = pl_module.score > self.best
        self.best = max(self.best, pl_module.score)
        self._save(trainer, best=improved)

    def on_train_end(self, trainer: Trainer, pl_module: PPAPModule) -> None:
        """Saves what no validation has saved."""
        if self._saved_step < self._at.step:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: PPAPModule, exception: BaseException) -> None:
        """Saves where a fault outside the program ends the run, such as an image that has gone.

        Of several processes the others know nothing of it, and cannot take part.
        """
        foreseen = isinstance(exception, UserError) and not isinstance(exception, (Stopped, NotFinite))
        alone = trainer.world_size == 1
        if alone and (foreseen or lost_loader(exception)) and self._saved_step < self._at.step:
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: PPAPModule, checkpoint: dict[str, Any]) -> None:
        """Adds the progress; Lightning's own loops always start afresh, on the steps that are left."""
        checkpoint.pop("loops", None)
        runs = wandb_runs(trainer.loggers)
        progress = replace(
            self._at,
            best=self.best,
            seconds=self.spent,
            wandb_id=runs[0].id if runs else None,
            random=random_states(),
        )
        checkpoint[PROGRESS] = progress.as_entry()

    def _due(self, trainer: Trainer) -> bool:
        if self._at.step <= self._saved_step:
            return False
        if not self.validated and self.schedule.ends_epoch(self._at.step):
            return True
        if self.steps is not None:
            return self._at.step % self.steps == 0
        if self.seconds is None:
            return False
        late = time.perf_counter() - self._saved >= self.seconds
        return trainer.strategy.reduce_boolean_decision(late, all=False)  # each process has its own clock

    def _asked(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self.stop.signum is not None, all=False)

    def _save(self, trainer: Trainer, *, best: bool = False) -> None:
        for logger in trainer.loggers:
            logger.save()  # first, so that no checkpoint is ahead of metrics.csv
        newest = self.folder / NEWEST
        trainer.save_checkpoint(newest)
        if trainer.is_global_zero:
            if best or not self.validated:
                copy_whole(newest, self.folder / BEST)
            shift_names(self.folder)
        trainer.strategy.barrier()  # from here on every process may read them
        self._saved_step, self._saved = self._at.step, time.perf_counter()

    def _leave(self, trainer: Trainer) -> None:
        at = f"at step {self._at.step:,} of {self.schedule.total:,}, saved in {self.folder / LAST}"
        told = [at, *([requeue()] if in_slurm_job() and trainer.is_global_zero else [])]
        signum = self.stop.signum or signal.SIGTERM
        raise Stopped("; ".join([*told, f"go on with: {command_to_go_on()}"]), signum=signum)
