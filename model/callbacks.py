"""Callbacks that show a run: tables and images in wandb, and report.html in the run's folder."""

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

from model.evaluator import Prediction
from model.explain import explain_images
from model.module import PPAPModule
from model.results import ShownImages, class_iou, class_maps
from utils.config.options import WandbOptions
from utils.errors import first_line
from utils.plots.explain_figure import draw_explanation
from utils.plots.report import NAME, write_report
from utils.plots.tables import METRICS, STAGES
from utils.plots.wandb_media import confusion_table, iou_chart, prediction_table
from utils.training.loggers import attach, wandb_runs
from utils.vision.labels import LabelSpace

EXPLANATION = "explanation.png"
FINAL_FILES = ("metrics.json", NAME)
FINAL_PICTURES = ("predictions.png", "confusion.png", "class_iou.png", EXPLANATION)
TABLES_SHARE = 0.05  # of the training time that wandb's tables may take


class WandbImages(Callback):
    """Sends tables and images of validations to wandb, and finally the results.

    Tables follow the first validation, the last one, and others as long as they take at most `TABLES_SHARE`
    of the time.

    Args:
        options: wandb's options.
        folder: of the run.
        loggers: of the run.
        shown: validation images to show, those that the module keeps predictions of; None shows none.
        best: largest sum of metrics before a resume.
    """

    def __init__(
        self,
        options: WandbOptions,
        folder: Path,
        *,
        loggers: Sequence[Logger],
        shown: ShownImages | None,
        best: float = float("-inf"),
    ) -> None:
        self.options, self.folder, self.shown, self.best = options, folder, shown, best
        self._runs = wandb_runs(loggers)  # none on other ranks than zero
        self._predictions: list[Prediction] = []
        self._step = self._sent_step = 0
        self._next_tables = 0.0  # time from which tables may be sent again

    def on_validation_end(self, trainer: Trainer, pl_module: PPAPModule) -> None:
        """Sends the best metrics so far, and tables if they are due."""
        if self.options.mode == "disabled":
            return
        self._step = pl_module.global_step
        self._predictions = pl_module.evaluator.predictions()  # on all ranks
        self._send_best(pl_module)
        if time.perf_counter() >= self._next_tables:
            self._send_tables(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: PPAPModule) -> None:
        """Sends the tables of the last validation."""
        if self._sent_step != self._step:
            self._send_tables(pl_module)

    def close(self) -> None:
        """Ends the wandb run, so that the next run of a sweep gets its own."""
        for run in self._runs:
            run.finish()

    def finish(self, result: dict[str, Any], *, checkpoint: Path) -> None:
        """Sends summary, pictures, files and, if `wandb.artifact` is set, the checkpoint.

        Args:
            result: content of metrics.json.
            checkpoint: the best.
        """
        with errors_as_warnings():
            for run in self._runs:
                run.summary.update(summary_of(result))
                existing = [self.folder / name for name in FINAL_PICTURES if (self.folder / name).exists()]
                pictures = {path.stem: wandb.Image(str(path)) for path in existing}
                run.log(pictures | {"iters": result["step"]}, step=run.step + 1)
                attach(run, self.folder, FINAL_FILES)
                if self.options.artifact:
                    run.log_artifact(checkpoint_artifact(checkpoint, run.id, result=result))

    def _send_best(self, module: PPAPModule) -> None:
        """Updates the summary after the first validation with the largest sum of metrics, as in best.ckpt."""
        metrics = module.last_evaluation.metrics()
        if metrics and sum(metrics.values()) > self.best:
            self.best = sum(metrics.values())
            for run in self._runs:
                run.summary.update(summary_of({"step": self._step, "before_crf": metrics}))

    def _send_tables(self, module: PPAPModule) -> None:
        start = time.perf_counter()
        with errors_as_warnings():
            for run in self._runs:
                # with the run's step: a call without one would count as a step, and wandb drop the next point
                run.log(self._tables(module) | {"iters": self._step}, step=self._step)
        now = time.perf_counter()
        self._next_tables = now + (now - start) / TABLES_SHARE
        self._sent_step = self._step

    def _tables(self, module: PPAPModule) -> dict[str, Any]:
        evaluation, labels = module.last_evaluation, module.labels
        tables: dict[str, Any] = {}
        for head, scores in evaluation.heads().items():
            tables[f"validation/confusion_{head}"] = confusion_table(scores.confusion, labels)
            iou = dict(zip(labels.names, scores.iou, strict=True))
            tables[f"validation/iou_{head}"] = iou_chart(iou, title=f"IoU per class, {head} probe (%)")
        if self.shown is not None:
            maps = [class_maps(prediction, labels, evaluation) for prediction in self._predictions]
            tables["validation/predictions"] = prediction_table(
                self.shown.names, self.shown.pictures(), maps=maps, labels=labels
            )
        return tables


class HtmlReport(Callback):
    """Keeps report.html up to date: metrics and curves after each validation, pictures at the end.

    The first validation also draws what propagation does for one anchor: it depends only on the frozen
    features, which never change.

    Args:
        folder: of the run.
        labels: class names and colours.
        shown: validation images that are searched for the anchor's patches; None draws nothing.
    """

    def __init__(self, folder: Path, labels: LabelSpace, *, shown: ShownImages | None) -> None:
        self.folder, self.labels, self.shown = folder, labels, shown

    def on_validation_end(self, trainer: Trainer, pl_module: PPAPModule) -> None:
        """Writes the page with the results so far."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()  # the page shows metrics.csv
        evaluation, step = pl_module.last_evaluation, pl_module.global_step
        total = trainer.max_epochs * trainer.num_training_batches
        result = {
            "step": step,
            "before_crf": evaluation.metrics(),
            "class_iou": {"before_crf": class_iou(evaluation, self.labels.names)},
        }
        state = f"Training: step {step:,} of {total:,}. Pictures and CRF follow at the end."
        with errors_as_warnings():
            self._explain(trainer, pl_module)
            write_report(self.folder, labels=self.labels, state=state, result=result, pictures=False)

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the page of the finished run; `result` is the content of metrics.json."""
        minutes = 60 * result["train_hours"]
        state = f"Finished: {result['images']:,} validation images, {minutes:.1f} minutes of training."
        with errors_as_warnings():
            write_report(self.folder, labels=self.labels, state=state, result=result)

    @torch.no_grad()
    def _explain(self, trainer: Trainer, module: PPAPModule) -> None:
        propagates = module.options.training_coeff.loss == "ppap" and not module.frozen
        path = self.folder / EXPLANATION
        if self.shown is None or not propagates or path.exists():
            return
        draw_explanation(
            path,
            explain_images(module, self.shown.images, patch=None, trainer=trainer),
            pictures=self.shown.pictures(),
            names=self.shown.names,
            about=f"bank: {len(self.shown.images)} validation images",
        )


@contextmanager
def errors_as_warnings() -> Iterator[None]:
    """Prints an error of wandb or the disk in one line: it must not end the run."""
    try:
        yield
    except wandb.errors.Error as error:
        print(f"wandb: {first_line(error)}; the run continues without it")
    except OSError as error:
        print(f"{error.filename or NAME}: {error.strerror}; the run continues without it")


def summary_of(result: dict[str, Any]) -> dict[str, float]:
    """`best_step`, `best_<metric>`, `best_<metric>_crf`, and training time and memory, from metrics.json."""
    summary = {"best_step": result["step"]}
    for stage, suffix in zip(STAGES, ("", "_crf"), strict=True):
        metrics = result.get(stage) or {}
        summary |= {f"best_{name}{suffix}": metrics[name] for name in METRICS if name in metrics}
    return summary | {name: result[name] for name in ("train_hours", "peak_memory_gib") if name in result}


def checkpoint_artifact(path: Path, run: str, *, result: dict[str, Any]) -> wandb.Artifact:
    """A checkpoint as wandb's model artifact, with its metrics."""
    name = re.sub(r"[^\w.-]+", "_", f"{run}-best")
    artifact = wandb.Artifact(name, type="model", metadata=summary_of(result))
    artifact.add_file(str(path))
    return artifact
