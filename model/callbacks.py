"""A run as it is watched: tables and pictures for wandb, and report.html beside the run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import wandb
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import Logger

from model.explain import explain_images
from model.module import PPAPModule
from model.results import class_iou, class_maps
from utils.config.options import Options
from utils.errors import first_line
from utils.plots.explain_figure import draw_explanation
from utils.plots.report import NAME, write_report
from utils.plots.tables import METRICS, STAGES
from utils.plots.wandb_media import confusion_table, iou_chart, prediction_table
from utils.training.launch import is_rank_zero
from utils.training.loggers import attach, close_loggers, wandb_runs
from utils.training.shown import ShownImages
from utils.vision.labels import LabelSpace

EXPLANATION = "explanation.png"
FINAL_FILES = ("metrics.json", NAME)
FINAL_PICTURES = ("predictions.png", "confusion.png", "class_iou.png")
TABLES_SHARE, EXPLAIN_SHARE = 0.05, 0.01  # of a run's time that each may take while it trains
EXPLAIN_SECONDS = 4.0  # what the explanation is taken to cost before it was made


class Allowance:
    """Whether something may be done: its cost is to stay below a share of the time since it was last done.

    Args:
        share: of the time.
        seconds: what it is taken to cost at first.
    """

    def __init__(self, share: float, seconds: float) -> None:
        self.share, self.seconds = share, seconds
        self.since = time.perf_counter()
        self.done = 0

    def due(self) -> bool:
        """Whether it may be done now."""
        return self.seconds <= self.share * (time.perf_counter() - self.since)

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_exception: object) -> None:
        self.since = time.perf_counter()
        self.seconds = self.since - self._start
        self.done += 1


class Dashboard(Callback):
    """Sends what a validation gave to wandb, and keeps report.html up to date.

    After each validation the page has curves, metrics and IoU per class; its pictures follow at the end,
    where `finish` is called. Tables for wandb and the explanation of an anchor are made after a validation
    where that takes at most a share of the time gone by, and in any case when training ends. Of several
    processes the first alone does so.

    Args:
        options: all options.
        folder: of the run.
        shown: images to show; None shows none.
        loggers: of the run; this ends them.
        best: the largest sum of metrics of an earlier start.
    """

    def __init__(
        self,
        options: Options,
        folder: Path,
        *,
        shown: ShownImages | None,
        loggers: Sequence[Logger],
        best: float = float("-inf"),
    ) -> None:
        self.options, self.folder, self.shown, self.loggers = options, folder, shown, loggers
        self.labels: LabelSpace | None = None
        self.best = best
        self._tables = Allowance(TABLES_SHARE, 0.0)
        self._explained = Allowance(EXPLAIN_SHARE, EXPLAIN_SECONDS)
        self._step, self._sent = 0, 0  # of the last validation, and of the last tables

    def on_fit_start(self, trainer: Trainer, pl_module: PPAPModule) -> None:
        self.labels = pl_module.labels

    def on_validation_end(self, trainer: Trainer, pl_module: PPAPModule) -> None:
        """Tables where they are due, the best metrics so far, and the page."""
        if not is_rank_zero():
            return
        self._step = pl_module.global_step
        self._note_best(pl_module)
        if self._tables.due():
            self._send_tables(pl_module)
        if self._explained.due():
            self._explain(trainer, pl_module)
        for logger in self.loggers:
            logger.save()  # metrics.csv as far as it goes, which the page shows
        self._write_page(pl_module, steps=trainer.max_epochs * trainer.num_training_batches)

    def on_train_end(self, trainer: Trainer, pl_module: PPAPModule) -> None:
        """What was not due before."""
        if not is_rank_zero():
            return
        if self._sent != self._step:
            self._send_tables(pl_module)
        self._explain(trainer, pl_module)

    def finish(self, result: dict[str, Any], *, checkpoint: Path) -> None:
        """The last page, and for wandb the summary, pictures, files and, where asked for, the checkpoint.

        Args:
            result: what metrics.json holds.
            checkpoint: the best.
        """
        spent = f"{60 * result['train_hours']:.1f} minutes of training"
        state = f"{result['images']:,} validation images, {spent}."
        write_report(self.folder, labels=self.labels, state=f"Finished: {state}", result=result)
        with going_on():
            self._send_result(result, checkpoint=checkpoint)

    def _send_result(self, result: dict[str, Any], *, checkpoint: Path) -> None:
        for opened in wandb_runs(self.loggers):
            opened.summary.update(summary_of(result))
            there = [name for name in FINAL_PICTURES if (self.folder / name).exists()]
            pictures = {Path(name).stem: wandb.Image(str(self.folder / name)) for name in there}
            opened.log(pictures | {"iters": self._step})
            attach(opened, self.folder, FINAL_FILES)
            if self.options.wandb.artifact:
                opened.log_artifact(checkpoint_artifact(checkpoint, opened.id, result=result))

    def close(self) -> None:
        """Ends the loggers."""
        close_loggers(self.loggers)

    def _note_best(self, module: PPAPModule) -> None:
        """Puts the first of the largest sums of metrics, which best.ckpt has too, into wandb's summary."""
        metrics = module.last_evaluation.metrics()
        if metrics and sum(metrics.values()) > self.best:
            self.best = sum(metrics.values())
            for opened in wandb_runs(self.loggers):
                opened.summary.update(summary_of({"step": self._step, "before_crf": metrics}))

    def _send_tables(self, module: PPAPModule) -> None:
        opened = wandb_runs(self.loggers)
        if not opened:
            return
        with self._tables, going_on():
            for run in opened:
                run.log(self._tables_of(module) | {"iters": self._step})
        self._sent = self._step

    def _tables_of(self, module: PPAPModule) -> dict[str, Any]:
        evaluation, labels = module.last_evaluation, module.labels
        found: dict[str, Any] = {}
        for head, scores in evaluation.heads().items():
            found[f"validation/confusion_{head}"] = confusion_table(scores.confusion, labels)
            iou = dict(zip(labels.names, scores.iou, strict=True))
            found[f"validation/iou_{head}"] = iou_chart(iou, title=f"IoU per class, {head} probe (%)")
        if pictures := module.evaluator.predictions():
            found["validation/predictions"] = prediction_table(
                self.shown.names,
                self.shown.images.permute(0, 2, 3, 1).numpy(),  # (P, H, W, 3)
                maps=[class_maps(picture, module, evaluation) for picture in pictures],
                labels=labels,
            )
        return found

    @torch.no_grad()
    def _explain(self, trainer: Trainer, module: PPAPModule) -> None:
        """Once a run: the frozen features that it looks at never change."""
        propagates = self.options.training_coeff.loss == "ppap" and not module.frozen
        if self.shown is None or not propagates or self._explained.done:
            return
        with self._explained:
            found = explain_images(module, self.shown.images, patch=None, trainer=trainer)
            path = self.folder / EXPLANATION
            draw_explanation(
                path,
                found,
                pictures=self.shown.images.permute(0, 2, 3, 1).numpy(),  # (P, H, W, 3)
                names=self.shown.names,
                about=f"bank: {len(self.shown.images)} validation images",
            )
        with going_on():
            for run in wandb_runs(self.loggers):
                run.log({"explanation": wandb.Image(str(path)), "iters": self._step})

    def _write_page(self, module: PPAPModule, *, steps: int) -> None:
        evaluation = module.last_evaluation
        result = {
            "step": self._step,
            "before_crf": evaluation.metrics(),
            "class_iou": {"before_crf": class_iou(evaluation, module.labels.names)},
        }
        state = f"Training: step {self._step:,} of {steps:,}. Pictures and CRF follow at the end."
        with going_on():
            write_report(self.folder, labels=module.labels, state=state, result=result, pictures=False)


@contextmanager
def going_on() -> Iterator[None]:
    """Tells what wandb or the disk complains of, in a line: a run is worth more than its pictures."""
    try:
        yield
    except wandb.errors.Error as error:
        print(f"wandb: {first_line(error)}; the run goes on without")
    except OSError as error:
        print(f"{error.filename or NAME}: {error.strerror}; the run goes on without")


def summary_of(result: dict[str, Any]) -> dict[str, float]:
    """`best_<metric>`, `best_<metric>_crf`, and what else of metrics.json is a single number."""
    found = {"best_step": result["step"]}
    for stage, ending in zip(STAGES, ("", "_crf"), strict=True):
        metrics = result.get(stage) or {}
        found |= {f"best_{name}{ending}": metrics[name] for name in METRICS if name in metrics}
    return found | {name: result[name] for name in ("train_hours", "peak_memory_gib") if name in result}


def checkpoint_artifact(path: Path, run: str, *, result: dict[str, Any]) -> wandb.Artifact:
    """The best checkpoint as a model, with its metrics."""
    name = re.sub(r"[^\w.-]+", "_", f"{run}-best")
    artifact = wandb.Artifact(name, type="model", metadata=summary_of(result))
    artifact.add_file(str(path))
    return artifact
