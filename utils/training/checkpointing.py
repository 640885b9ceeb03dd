"""Checkpoints of a run: when they are written, what they contain, and where a run resumes."""

import copy
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.io import TorchCheckpointIO

from utils.files import replacing
from utils.training.distributed import Agreement
from utils.training.loggers import wandb_runs
from utils.training.run_dir import BEST, LAST, Progress
from utils.training.stopping import Stopped, StopSignal, worker_was_killed
from utils.training.torch_files import read_torch_file, write_torch_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints, with integrity checks and atomic writes."""

    def load_checkpoint(self, path: str, *_: Any, **_settings: Any) -> dict[str, Any]:
        """Reads a checkpoint."""
        return read_torch_file(Path(path))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        """Writes a checkpoint, completely or not at all."""
        write_torch_file(checkpoint, Path(path))


class CheckpointManager(Callback):
    """Keeps best.ckpt (largest sum of metrics) and last.ckpt, and stops the run on request.

    Saves after each validation, every `train.checkpoint_every` in between, on a stop signal, and when an
    error ends the run between two steps. Without validation images it saves after each epoch, and best.ckpt
    is the newest. A checkpoint describes the moment between two steps, so that a resumed run computes what
    the uninterrupted one would. `every`: (steps, seconds) between checkpoints, at most one not None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: tuple[int | None, float | None],
        validates: bool,
        stop: StopSignal,
        progress: Progress,
    ) -> None:
        self.folder, self.validates, self.stop, self.progress = folder, validates, stop, progress
        self.steps, self.seconds = every
        self._loops: dict[str, Any] = {}
        self._agreement = Agreement()
        self._saved_step, self._saved = progress.step, time.perf_counter()
        self._in_step = False
        self._max_steps: int | None = None  # the limit, while it is lifted
        self._began = time.perf_counter() - progress.seconds

    @property
    def spent(self) -> float:
        """Training time in seconds, including that before a resume."""
        return time.perf_counter() - self._began

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the validation that was due when the run stopped; Lightning skips it on resume."""
        self.stop.listen()  # Lightning has replaced the handlers
        self._loops = self._loops or _resumable_loops(trainer)
        trainer.fit_loop.epoch_loop.max_steps = self._max_steps or trainer.max_steps
        if self.validates and not self.progress.validated:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Saves or stops between two steps: loggers and callbacks have finished the previous one."""
        stopping, due = self._agreement.result()
        if stopping:
            self._stop(trainer)
        if due and self._saved_step < self.progress.step:
            self._save(trainer)
        self._in_step = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Records the position in the run."""
        self._in_step = False
        step_of_epoch = trainer.fit_loop.batch_idx + 1
        validated = not self.validates or trainer.val_check_batch != step_of_epoch  # see ValidationSteps
        self.progress = replace(self.progress, step=trainer.global_step, validated=validated)
        self._loops = _resumable_loops(trainer)
        due = self.steps is not None and trainer.global_step % self.steps == 0
        if self.seconds is not None:
            due = time.perf_counter() - self._saved >= self.seconds
        self._agreement.start(self.stop.signum is not None, due)

    def on_validation_start(self, *_: Any) -> None:
        """Installs the handlers again: starting the workers of a validation may have replaced them."""
        self.stop.listen()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stops during a validation on request; the resumed run repeats it."""
        if trainer.strategy.reduce_boolean_decision(self.stop.signum is not None, all=False):
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, and updates best.ckpt if the score improved."""
        step, score = self.progress.step, pl_module.score
        self.progress = replace(
            self.progress, validated=True, best=pl_module.best, scored_step=step, score=score
        )
        self._save(trainer, best=pl_module.improved)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after each epoch if there is no validation."""
        if not self.validates:
            self._save(trainer, best=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves if the error, such as damaged data or a killed worker, occurred between two steps.

        Within a step, the weights may be ahead of the recorded position. Saving needs all ranks.
        """
        if trainer.world_size == 1 and not self._in_step and self._saved_step < self.progress.step:
            self._save(trainer)
        if worker_was_killed(exception) and self.stop.signum is not None:  # it reached them too
            raise self._stopped(trainer) from exception

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        """Restores the position that the run resumes from.

        An epoch whose last batch is trained becomes complete, or Lightning would count it twice; the last
        epoch stays open, so that the hooks around training still run. With `max_steps`, Lightning treats
        every restored epoch as interrupted, so its batches are reset here.
        """
        if self.validates and not self.progress.validated:  # at max_steps, Lightning would skip all hooks
            self._max_steps, trainer.fit_loop.epoch_loop.max_steps = trainer.max_steps, -1
        self._loops = state = checkpoint["loops"]["fit_loop"]
        epochs, batches = state["epoch_progress"]["current"]["ready"], state["epoch_loop.batch_progress"]
        if batches["is_last_batch"] and epochs < trainer.max_epochs:
            batches["is_last_batch"] = False
            _set_counters(batches["total"], batches["total"]["ready"])
            _set_counters(batches["current"], 0)
            for counters in state["epoch_progress"].values():
                _set_counters(counters, epochs)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        """Adds the progress, and the position between two steps instead of the one inside a hook."""
        wandb_id = next((run.id for run in wandb_runs(trainer.loggers)), None)
        checkpoint["progress"] = asdict(replace(self.progress, seconds=self.spent, wandb_id=wandb_id))
        checkpoint["loops"]["fit_loop"] = self._loops

    def _save(self, trainer: Trainer, *, best: bool = False) -> None:
        for logger in trainer.loggers:
            logger.save()  # first, so that no checkpoint is ahead of metrics.csv
        trainer.save_checkpoint(self.folder / (BEST if best else LAST))
        if best and trainer.is_global_zero:  # last.ckpt second: its best is then on disk
            with replacing(self.folder / LAST, sync=True) as temporary:
                shutil.copyfile(self.folder / BEST, temporary)
        trainer.strategy.barrier()  # from here on every rank may read them
        self._saved_step, self._saved = self.progress.step, time.perf_counter()

    def _stop(self, trainer: Trainer) -> None:
        self._save(trainer)
        raise self._stopped(trainer)

    def _stopped(self, trainer: Trainer) -> Stopped:
        total, signum = trainer.estimated_stepping_batches, self.stop.signum or signal.SIGTERM
        place = f"at step {self._saved_step:,} of {total:,}, saved in {self.folder / LAST}"
        return Stopped(f"{place}; to continue, repeat the command with --resume", signum=signum)


def _resumable_loops(trainer: Trainer) -> dict[str, Any]:
    """State of Lightning's loops after a training batch; a validation starts from its first batch."""
    state = copy.deepcopy(trainer.fit_loop.state_dict())
    _set_counters(state["epoch_loop.val_loop.batch_progress"]["current"], 0)
    return state


def _set_counters(counters: dict[str, int], count: int) -> None:
    counters.update(dict.fromkeys(counters, count))
