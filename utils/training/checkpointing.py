"""Checkpoints of a run: when they are written, what they hold, and where a run resumes."""

from __future__ import annotations

import copy
import shutil
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.io import TorchCheckpointIO

from utils.errors import NotFinite, UserError
from utils.files import replacing
from utils.training.distributed import Agreement
from utils.training.launch import in_slurm_job
from utils.training.stopping import Stopped, StopSignal, requeue, resume_command
from utils.training.torch_files import read_torch_file, write_torch_file

BEST, LAST = "best.ckpt", "last.ckpt"
PROGRESS = "progress"  # entry of a checkpoint


@dataclass(frozen=True)
class Progress:
    """Progress of a run at a checkpoint.

    Attributes:
        step: the last trained step, from 1; 0 before the first.
        validated: False if the validation that follows this step has not been done.
        best: largest sum of metrics so far.
        seconds: training time.
        wandb_id: the wandb run, or None.
    """

    step: int = 0
    validated: bool = True
    best: float = float("-inf")
    seconds: float = 0.0
    wandb_id: str | None = None


def read_progress(path: Path) -> Progress:
    """The progress stored in one of our checkpoints.

    Raises:
        UserError: damaged, or not a checkpoint that a run can resume from.
    """
    content = read_torch_file(path, "checkpoint")
    stored = content.get(PROGRESS) if isinstance(content, dict) else None
    if not isinstance(stored, dict) or "loops" not in content:
        raise UserError(f"{path}: not a checkpoint to resume from; use one that run.py wrote")
    return Progress(**{name: stored[name] for name in asdict(Progress())})


class CheckedCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints: atomic writes, integrity-checked reads."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        """Writes a checkpoint, completely or not at all."""
        write_torch_file(checkpoint, Path(path))

    def load_checkpoint(self, path: str, *_arguments: Any, **_keywords: Any) -> dict[str, Any]:
        """Reads a checkpoint onto the CPU."""
        return read_torch_file(Path(path), "checkpoint")


class CheckpointManager(Callback):
    """Keeps best.ckpt (largest sum of metrics) and last.ckpt, and stops the run on request.

    Saves after each validation, every `train.checkpoint_every` in between, on a stop signal, and when an
    error outside the program ends the run. Without validation images it saves after each epoch, and best.ckpt
    is the newest. A checkpoint always describes the moment between two steps, so that a resumed run computes
    what the uninterrupted one would have computed.

    Args:
        folder: of the run.
        valid_freq: steps between validations, besides each epoch's end.
        every: (steps, seconds) between checkpoints; at most one is not None.
        validates: whether there are validation images.
        stop: notes stop signals.
        progress: what the run resumes from.
        wandb_id: of the run, or None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        valid_freq: int,
        every: tuple[int | None, float | None],
        validates: bool,
        stop: StopSignal,
        progress: Progress,
        wandb_id: str | None = None,
    ) -> None:
        self.folder, self.valid_freq, self.validates, self.stop = folder, valid_freq, validates, stop
        self.steps, self.seconds = every
        self.best, self.wandb_id = progress.best, wandb_id
        self._start, self._now = progress, progress
        self._loops: dict[str, Any] = {}
        self._agreement = Agreement()
        self._began = self._saved = time.perf_counter()
        self._saved_step = progress.step

    @property
    def spent(self) -> float:
        """Training time in seconds, including that before a resume."""
        return self._start.seconds + time.perf_counter() - self._began

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals from Lightning, and makes the validation that was due at the stop.

        Lightning itself skips that validation once the state of its loops was restored.
        """
        self.stop.listen()
        self._loops = self._loops or resumable_loops(trainer)
        if not self._start.validated and self.validates:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_batch: Any) -> None:
        """Saves or stops between two steps: loggers and callbacks have finished the previous one."""
        stopping, due = self._agreement.result() or (self._stop_requested, self._due(trainer))
        if stopping or due:
            self._save(trainer)
        if stopping:
            self._leave(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the position in the run."""
        due = self.validates and validation_due(batch_idx, trainer.num_training_batches, self.valid_freq)
        self._now = Progress(trainer.global_step, validated=not due)
        self._loops = resumable_loops(trainer)
        self._agreement.start((self._stop_requested, self._due(trainer)))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_batch: Any) -> None:
        """Leaves an unfinished validation on request; the resumed run starts it again."""
        if trainer.state.fn != "fit":
            return
        stopping = trainer.strategy.reduce_boolean_decision(self._stop_requested, all=False)
        if stopping:
            self._save(trainer)
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, and keeps the best."""
        self._now = replace(self._now, validated=True)
        improved = pl_module.score > self.best
        self.best = max(self.best, pl_module.score)
        self._save(trainer, best=improved)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step if no validation has saved it."""
        if self._saved_step < self._now.step:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves if an external error ends the run; several ranks cannot save without each other."""
        outside = isinstance(exception, UserError) and not isinstance(exception, (Stopped, NotFinite))
        outside = outside or "DataLoader worker (pid" in str(exception)
        if trainer.world_size == 1 and outside and self._saved_step < self._now.step:
            self._save(trainer)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the position that the run resumes from."""
        self._loops = checkpoint["loops"]["fit_loop"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the progress, and the position between two steps instead of the one inside a hook."""
        progress = replace(self._now, best=self.best, seconds=self.spent, wandb_id=self.wandb_id)
        checkpoint[PROGRESS] = asdict(progress)
        checkpoint["loops"]["fit_loop"] = self._loops

    @property
    def _stop_requested(self) -> bool:
        return self.stop.signum is not None

    def _due(self, trainer: Trainer) -> bool:
        """Whether this rank's schedule asks for a checkpoint now."""
        step = self._now.step
        if step <= self._saved_step:
            return False
        if not self.validates and step % trainer.num_training_batches == 0:
            return True
        if self.steps is not None:
            return step % self.steps == 0
        return self.seconds is not None and time.perf_counter() - self._saved >= self.seconds

    def _save(self, trainer: Trainer, *, best: bool = False) -> None:
        for logger in trainer.loggers:
            logger.save()  # first, so that no checkpoint is ahead of metrics.csv
        trainer.save_checkpoint(self.folder / LAST)
        if trainer.is_global_zero and (best or not self.validates):
            copy_file(self.folder / LAST, self.folder / BEST)
        trainer.strategy.barrier()  # every rank may read them from here on
        self._saved_step, self._saved = self._now.step, time.perf_counter()

    def _leave(self, trainer: Trainer) -> None:
        total = trainer.max_epochs * trainer.num_training_batches
        words = [f"at step {self._now.step:,} of {total:,}, saved in {self.folder / LAST}"]
        if in_slurm_job() and trainer.is_global_zero:
            words.append(requeue())
        words.append(f"resume with: {resume_command()}")
        raise Stopped("; ".join(words), signum=self.stop.signum or signal.SIGTERM)


def validation_due(batch_idx: int, batches: int, valid_freq: int) -> bool:
    """Whether a validation follows a batch, from 0: every `valid_freq` steps of an epoch and at its end."""
    return (batch_idx + 1) % valid_freq == 0 or batch_idx + 1 == batches


def resumable_loops(trainer: Trainer) -> dict[str, Any]:
    """State of Lightning's loops after a training batch, in a form that Lightning resumes correctly.

    A validation always starts from its first batch, and an epoch whose last batch is trained counts as
    complete: Lightning would otherwise count that epoch twice. The last epoch stays open, so that the hooks
    around training still run.
    """
    state = copy.deepcopy(trainer.fit_loop.state_dict())
    _set_counters(state["epoch_loop.val_loop.batch_progress"]["current"], 0)
    epochs = trainer.current_epoch + 1
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and epochs < trainer.max_epochs:
        batches = state["epoch_loop.batch_progress"]["total"]
        _set_counters(batches, batches["ready"])
        for counters in (state["epoch_progress"]["total"], state["epoch_progress"]["current"]):
            _set_counters(counters, epochs)
    return state


def _set_counters(counters: dict[str, int], count: int) -> None:
    """Sets ready, started, processed and completed alike."""
    counters.update(dict.fromkeys(counters, count))


def copy_file(source: Path, path: Path) -> None:
    """Copies a file, completely or not at all.

    Raises:
        UserError: it cannot be written; the previous file is intact.
    """
    try:
        with replacing(path, sync=True) as temporary:
            shutil.copyfile(source, temporary)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); the previous file is intact"
        ) from None
