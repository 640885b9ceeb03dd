"""Callbacks: images in wandb, report.html in the run's folder, and images for HP's pools."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wandb
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from loss import ieee_float32
from model.explain import explain_images
from model.module import PPAPModule
from model.results import class_iou, class_maps, errors_as_warnings
from utils.files import make_folder
from utils.plots.explain_figure import draw_explanation
from utils.plots.figures import UNMATCHED, colour, write_strip
from utils.plots.report import NAME, STRIPS, write_report
from utils.plots.tables import STAGES
from utils.training.loggers import attach, wandb_step
from utils.vision.labels import IGNORE, LabelSpace

PICTURES = ("predictions.png", "confusion.png", "class_iou.png", "explanation.png")
STRIP_IMAGES = 4
Shown = Sequence[tuple[str, Tensor]]  # name and (3, H, W) uint8 of the validation images that are shown


class WandbImages(Callback):
    """Sends IoU per class, images and the best metrics to wandb after each validation, and the results.

    `runs`: the wandb run of this process, if any; `shown`: the images that the module keeps predictions of.
    """

    def __init__(self, runs: Sequence[wandb.Run], shown: Shown) -> None:
        self.runs, self.shown = runs, shown

    def on_validation_end(self, trainer: Trainer, pl_module: PPAPModule) -> None:
        """Sends IoU per class and images, and the metrics if they are the best."""
        step = pl_module.global_step
        for run in self.runs:
            with errors_as_warnings("wandb"):
                if pl_module.improved:
                    run.summary.update(summary_of({"step": step, "before_crf": pl_module.metrics}))
                # with the run's step: wandb would count a call without one as a step, and drop the next point
                row = self._validation(pl_module) | {"iters": step}
                run.log(row, step=wandb_step(step, validation=True))

    def finish(self, result: dict[str, Any], *, folder: Path, artifact: Path | None) -> None:
        """Sends the content of metrics.json, pictures, files and, if given, a checkpoint as an artifact."""
        for run in self.runs:
            with errors_as_warnings("wandb"):
                run.summary.update(summary_of(result))
                existing = [folder / name for name in PICTURES if (folder / name).exists()]
                pictures = {path.stem: wandb.Image(str(path)) for path in existing}
                last = max(run.step, run.starting_step)  # a resumed run starts at step 0 again
                free = last + (last % 3 < 2)  # see `wandb_step`
                run.log(pictures | {"iters": result["step"]}, step=free)
                attach(run, folder, ("metrics.json", NAME))
                if artifact is not None:
                    name = re.sub(r"[^\w.-]+", "_", f"{run.id}-best")
                    model = wandb.Artifact(name, type="model", metadata=summary_of(result))
                    model.add_file(str(artifact))
                    run.log_artifact(model)

    def _validation(self, module: PPAPModule) -> dict[str, Any]:
        evaluation, labels, logged = module.last_evaluation, module.labels, {}
        for head, iou in class_iou(evaluation, labels.names).items():
            logged |= {f"iou_{head}/{name}": value for name, value in iou.items() if math.isfinite(value)}
        known, images = dict(enumerate(labels.names)) | {IGNORE: "none"}, []
        for (name, image), prediction in zip(self.shown, module.last_predictions, strict=True):
            maps = class_maps(prediction, labels, evaluation).items()
            masks = {k: {"mask_data": ids.astype(np.uint8), "class_labels": known} for k, ids in maps}
            photograph = image.permute(1, 2, 0).numpy()  # (H, W, 3)
            images.append(wandb.Image(photograph, file_type="jpg", masks=masks, caption=name))
        # not in a table, which would block the run while the server is unreachable
        return logged | ({"validation/predictions": images} if images else {})


class ReferenceImages(Callback):
    """Passes random train images to the method before steps that need them."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: PPAPModule, _: Any, batch_idx: int) -> None:
        """Calls `Method.prepare` if it is due."""
        method, step = pl_module.method, trainer.global_step + 1
        if images := method.reference_images(step, batch_idx):
            loader, move = trainer.datamodule.random_batches(images, step), trainer.strategy.batch_to_device
            with trainer.precision_plugin.forward_context(), ieee_float32():
                method.prepare(pl_module.segmenter, (move(each) for each in loader), step)


class HtmlReport(Callback):
    """Keeps report.html up to date: metrics and curves after each validation, pictures at the end.

    The first validation also plots the propagation of one anchor, which needs only frozen features.
    """

    def __init__(self, folder: Path, labels: LabelSpace, shown: Shown) -> None:
        self.folder, self.labels, self.shown = folder, labels, shown

    def on_validation_end(self, trainer: Trainer, pl_module: PPAPModule) -> None:
        """Writes the page with the results so far."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()  # the page shows metrics.csv
        if self.shown:
            self._explain(trainer, pl_module)
            self._add_strip(pl_module)
        step, total = pl_module.global_step, trainer.estimated_stepping_batches
        iou = {"before_crf": class_iou(pl_module.last_evaluation, self.labels.names)}
        result = {"step": step, "before_crf": pl_module.metrics, "class_iou": iou}
        state = f"Training: step {step:,} of {total:,}. Pictures and CRF follow at the end."
        self._write(state=state, result=result, pictures=False)

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the page of the finished run; `result` is the content of metrics.json."""
        minutes = 60 * result["train_hours"]
        state = f"Finished: {minutes:.1f} minutes of training, {result['images']:,} images evaluated."
        self._write(state=" ".join(filter(None, (state, result.get("warning")))), result=result)

    def _write(self, **content: Any) -> None:
        with errors_as_warnings(self.folder / NAME):
            write_report(self.folder, labels=self.labels, **content)

    def _add_strip(self, module: PPAPModule) -> None:
        """Draws the clusters of the first images of this validation, and once the images."""
        folder, shown = self.folder / STRIPS, module.last_predictions[:STRIP_IMAGES]
        with errors_as_warnings(folder):
            maps = [class_maps(prediction, self.labels, module.last_evaluation) for prediction in shown]
            clusters = [colour(each["clusters"], self.labels, missing=UNMATCHED) for each in maps]
            write_strip(make_folder(folder) / f"{module.global_step:08}.png", clusters)
            photographs = [image.permute(1, 2, 0).numpy() for _, image in self.shown[: len(shown)]]
            write_strip(folder / "photographs.png", photographs)

    def _explain(self, trainer: Trainer, module: PPAPModule) -> None:
        path, options = self.folder / "explanation.png", module.options
        propagates = options.trained_by == options.training_coeff.loss == "ppap"
        if not propagates or path.exists():
            return
        with errors_as_warnings(path):
            names, images = zip(*self.shown, strict=True)
            stacked = torch.stack(images)  # (P, 3, H, W)
            found = explain_images(module, stacked, patch=None, trainer=trainer)
            pictures = stacked.permute(0, 2, 3, 1).numpy()  # (P, H, W, 3)
            draw_explanation(path, found, pictures=pictures, names=names)


def summary_of(result: dict[str, Any]) -> dict[str, float]:
    """`best_step`, `best_<metric>`, `best_<metric>_crf`, and training time and memory, from metrics.json."""
    summary = {"best_step": result["step"]}
    for stage, suffix in zip(STAGES, ("", "_crf"), strict=True):
        metrics = result.get(stage) or {}
        summary |= {f"best_{name}{suffix}": value for name, value in metrics.items()}
    return summary | {name: result[name] for name in ("train_hours", "peak_memory_gib") if name in result}
