"""A run's training: loggers, checkpoints, dashboard and Lightning's Trainer around a module and its data."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule

from model.callbacks import Dashboard
from model.module import PPAPModule
from model.saving import Saver
from utils.config.options import Options
from utils.training.checkpointing import Progress, Saved
from utils.training.faults import faults_told
from utils.training.loggers import build_loggers
from utils.training.shown import ShownImages
from utils.training.stopping import StopRequest
from utils.training.trainer import build_trainer


@dataclass(frozen=True)
class Trained:
    """What training has left beside its checkpoints.

    Attributes:
        dashboard: still open, so that wandb learns of the final evaluation too.
        hours: of training.
    """

    dashboard: Dashboard
    hours: float


def fit(
    options: Options,
    folder: Path,
    *,
    module: PPAPModule,
    data: LightningDataModule,
    hardware: dict[str, Any],
    saved: Saved | None,
) -> Trained:
    """Trains until the schedule's end.

    Args:
        options: all options.
        folder: of the run.
        module: what is trained.
        data: a `SegmentationDataModule`.
        hardware: from `hardware_settings`.
        saved: what to go on from; None starts.

    Raises:
        UserError: a fault outside the program; what was saved before is intact.
        Stopped: it was asked to leave, and has saved itself.
    """
    progress = Progress() if saved is None else saved.progress
    done = module.follow(data.schedule, progress)
    loggers = build_loggers(options, folder, progress)
    shown = ShownImages.of(data.validation_set, options.eval.pictures)
    dashboard = Dashboard(options, folder, shown=shown, loggers=loggers, best=progress.best)
    validated = len(data.validation_set) > 0
    saver = Saver(
        folder,
        data.schedule,
        every=options.train.checkpoint_every,
        validated=validated,
        stop=(stop := StopRequest()),
        progress=progress,
    )
    trainer = build_trainer(
        options,
        hardware,
        loggers=loggers,
        callbacks=[dashboard, saver],
        validate=validated,
        schedule=data.schedule,
        done=done,
    )
    try:
        with faults_told(options):
            if options.dataset.cache_features:
                encode = functools.partial(module.encode, trainer=trainer)
                precision = trainer.precision_plugin.precision
                data = data.with_tokens(encode, backbone=module.segmenter.backbone, precision=precision)
            data.start_after(done)
            with stop:
                trainer.fit(module, datamodule=data, ckpt_path=saved and saved.path, weights_only=True)
    except BaseException:
        dashboard.close()
        raise
    return Trained(dashboard, hours=saver.spent / 3600)
