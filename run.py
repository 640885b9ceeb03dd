"""Trains PPAP and evaluates it: python run.py --opt cocostuff.json

options -> data -> network -> loss and probes -> best checkpoint -> metrics before and after CRF
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import evaluate, results_folder, run_folder
from utils.config.cli import Job, guarded, parse_arguments, plan_jobs
from utils.config.loading import with_changes
from utils.config.options import FROZEN, Options
from utils.training.launch import is_rank_zero

if TYPE_CHECKING:
    from model.callbacks import HtmlReport, WandbImages
    from utils.training.run_dir import RunDir

# Commands import torch when they start: a mistyped option is reported at once.


def train(options: Options, run_dir: RunDir) -> tuple[float, HtmlReport, WandbImages]:
    """Trains one run, or resumes it; writes options, scalars and checkpoints to its folder.

    Returns:
        Training time in seconds, and the callbacks that show the final results.

    Raises:
        UserError: data or weights are missing or do not fit.
        Stopped: a signal asked the run to stop; everything is saved.
    """
    from dataset import build_data
    from model import build_module
    from model.callbacks import HtmlReport, WandbImages
    from model.checkpoint import read_checkpoint
    from model.results import ShownImages, shown_indices
    from utils.files import find_checkpoint
    from utils.training.checkpointing import CheckpointManager
    from utils.training.device import explained_errors, hardware_settings
    from utils.training.loggers import build_loggers
    from utils.training.stopping import StopSignal
    from utils.training.trainer import build_trainer

    hardware = hardware_settings(options)
    data = build_data(options)
    start = options.checkpoint and read_checkpoint(find_checkpoint(options.checkpoint, options.output_dir))
    module = build_module(
        options,
        data.labels,
        checkpoint=start or None,
        train_labelled=data.train_labelled,
        pictured=shown_indices(options.eval.pictures, len(data.validation_set)),
    )
    if not data.train_labelled:
        print("train data has no labels: no linear probe")
    checkpoint, progress = run_dir.resume_point(options)
    if checkpoint is None:
        run_dir.prepare(options, data.damaged)
    loggers = build_loggers(options, run_dir.path, step=progress.step, wandb_id=progress.wandb_id)
    shown = ShownImages.load(data.validation_set, options.eval.pictures)
    images = WandbImages(options.wandb, run_dir.path, loggers=loggers, shown=shown, best=progress.best)
    report = HtmlReport(run_dir.path, data.labels, shown=shown)
    with StopSignal() as stop, explained_errors(options):
        checkpoints = CheckpointManager(
            run_dir.path,
            every=options.train.checkpoint_interval,
            validates=len(data.validation_set) > 0,
            stop=stop,
            progress=progress,
        )
        trainer = build_trainer(options, hardware, loggers=loggers, callbacks=[images, report, checkpoints])
        try:
            if options.dataset.cache_features:
                encode = partial(module.frozen_tokens, trainer=trainer)
                precision = trainer.precision_plugin.precision
                data = data.with_tokens(encode, backbone=module.segmenter.backbone, precision=precision)
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except BaseException:
            images.close()
            raise
    return checkpoints.spent, report, images


def train_and_evaluate(options: Options) -> dict[str, Any]:
    """One run from data to metrics.json and report.html; returns the content of metrics.json."""
    from utils.training.device import peak_memory_gib, reset_peak_memory
    from utils.training.run_dir import RunDir

    run_dir = RunDir(options)
    with run_dir.lock():
        if options.resume is not None:
            run_dir.check_options(options)
            if (finished := run_dir.final_metrics()) is not None:
                print(f"{run_dir.path}: this run is finished")
                return finished
        reset_peak_memory()
        seconds, report, images = train(options, run_dir)
        try:
            result = evaluate(options, checkpoint=run_dir.best, folder=run_dir.path)
            result |= {"train_hours": seconds / 3600, "peak_memory_gib": peak_memory_gib()}
            if options.eval.last_step:
                last = run_dir.path / "last"
                result["last_step"] = evaluate(options, checkpoint=run_dir.last, folder=last)
            run_dir.write_metrics(result)
            if is_rank_zero():
                report.finish(result)
                images.finish(result, checkpoint=run_dir.best)
        finally:
            images.close()
    return result


def as_baseline(options: Options) -> Options:
    """The same run without any update of the head, under its own name."""
    names = {"wandb.name": options.wandb.name + FROZEN}
    if options.wandb.id is not None:
        names["wandb.id"] = options.wandb.id + FROZEN
    return with_changes(options, {"train.frozen": True, **names})


def run_job(job: Job) -> dict[str, dict[str, Any]]:
    """Runs one job: a run, preceded by its frozen baseline with `train.compare_frozen`."""
    options = as_baseline(job.options) if job.options.train.frozen else job.options
    if job.evaluate_only:
        checkpoint, folder = options.checkpoint or str(run_folder(options)), results_folder(options)
        print(f"{options.wandb.name}: evaluates {checkpoint}, results in {folder}")
        return {options.wandb.name: evaluate(options, checkpoint=checkpoint, folder=folder)}
    runs = [options]
    if options.train.compare_frozen and not options.train.frozen:
        runs.insert(0, as_baseline(options))
    results = {}
    for options in runs:
        print(f"\n{options.wandb.name}: {'frozen baseline' if options.train.frozen else 'PPAP'}")
        results[options.wandb.name] = train_and_evaluate(options)
    return results


def sweep_rows(job: Job, results: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(setting, result) of the run, its baseline, and the last step of each."""
    rows = []
    for name, result in results.items():
        compared = len(results) > 1 and ("frozen" if name.endswith(FROZEN) else "PPAP")
        setting = " ".join(filter(None, (job.setting, compared)))
        rows.append((setting, result))
        if "last_step" in result:
            rows.append((f"{setting}, last step".removeprefix(", "), result["last_step"]))
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs all jobs of a command line, one after another; returns the metrics of each."""
    jobs = plan_jobs(parse_arguments(argv, description="Train PPAP and evaluate it.", training=True))
    from utils.files import move_aside
    from utils.plots.tables import class_table, metrics_table, sweep_table, write_sweep

    finished, rows = [], []
    for job in jobs:
        results = run_job(job)
        print(f"\n{class_table(results)}\n\n{metrics_table(results)}")
        for name, result in results.items():
            if "train_hours" in result:
                spent = f"{result['train_hours']:.2f} h, peak memory {result['peak_memory_gib']:.1f} GiB"
                folder = Path(job.options.output_dir) / name
                print(f"{name}: best at step {result['step']}, {spent}, results in {folder}")
        finished.append(list(results.values())[-1])
        rows += sweep_rows(job, results)
        folder = Path(job.options.output_dir) / f"{job.base}-sweep"
        if len(jobs) > 1 and is_rank_zero():  # after each job: an interrupted sweep keeps its results
            if job is jobs[0]:
                move_aside(folder)
            write_sweep(folder, rows)
    if len(jobs) > 1:
        print(f"\n{sweep_table(rows)}\n\nresults of all runs: {folder}")
    return finished


if __name__ == "__main__":
    sys.exit(guarded(main))
