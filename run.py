"""Trains PPAP and evaluates it: python run.py --opt cocostuff.json

option file -> typed options -> data -> backbone -> head -> loss and probes -> metrics -> report
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import evaluate, results_folder, run_folder
from utils.config.cli import Job, guarded, parse_arguments, plan_jobs
from utils.config.loading import with_changes
from utils.config.options import FROZEN, Options
from utils.training.launch import is_rank_zero

if TYPE_CHECKING:
    from utils.training.run_dir import Saved


@dataclass
class Trained:
    dashboard: Any
    hours: float


# What needs torch is imported inside functions; see eval.py.


def train(options: Options, folder: Path, saved: Saved | None = None) -> Trained:
    """Trains one run and writes its options, scalars and checkpoints (best.ckpt, last.ckpt).

    Args:
        options: all options.
        folder: of the run; an earlier run in it is moved aside.
        saved: a checkpoint of the same run to resume from.

    Raises:
        UserError: data or weights are missing or do not fit.
        Stopped: a signal asked to stop; everything is saved.
    """
    from dataset import build_data
    from model import build_module
    from model.callbacks import Dashboard
    from utils.training.checkpointing import CheckpointManager, Progress
    from utils.training.faults import faults_told
    from utils.training.loggers import build_loggers, wandb_runs
    from utils.training.run_dir import begin
    from utils.training.shown import ShownImages
    from utils.training.stopping import StopSignal
    from utils.training.trainer import build_trainer, hardware_settings

    hardware = hardware_settings(options)
    data = build_data(options)
    shown = ShownImages.of(data.validation_set, options.eval.pictures)
    pictured = shown.places if shown is not None and options.wandb.mode != "disabled" else ()
    module = build_module(options, data.labels, train_labelled=data.train_labelled, pictured=pictured)
    if saved is None:
        begin(folder, options, left_out=data.damaged)
    progress = Progress() if saved is None else saved.progress
    loggers = build_loggers(options, folder, progress)
    validates = len(data.validation_set) > 0
    dashboard = Dashboard(options, folder, shown=shown, loggers=loggers, best=progress.best)
    checkpoints = CheckpointManager(
        folder,
        valid_freq=options.train.valid_freq,
        every=options.train.checkpoint_interval,
        validates=validates,
        stop=(stop := StopSignal()),
        progress=progress,
        wandb_id=next((opened.id for opened in wandb_runs(loggers)), None),
    )
    trainer = build_trainer(
        options, hardware, loggers=loggers, callbacks=[dashboard, checkpoints], validates=validates
    )
    try:
        with faults_told(options):
            if options.dataset.cache_features:
                encode = functools.partial(module.frozen_tokens, trainer=trainer)
                precision = trainer.precision_plugin.precision
                data = data.with_tokens(encode, backbone=module.segmenter.backbone, precision=precision)
            with stop:
                trainer.fit(module, datamodule=data, ckpt_path=saved and saved.path, weights_only=True)
    except BaseException:
        dashboard.close()
        raise
    return Trained(dashboard, hours=checkpoints.spent / 3600)


def train_and_evaluate(options: Options) -> dict[str, Any]:
    """One run from data to metrics.json and report.html; returns what the former holds."""
    from utils.files import write_json
    from utils.training.checkpointing import BEST, LAST
    from utils.training.run_dir import earlier_run, locked
    from utils.training.trainer import peak_memory_gib, reset_peak_memory

    folder = run_folder(options)
    with locked(folder):
        earlier = earlier_run(options, folder)
        if earlier.result is not None:
            return earlier.result
        reset_peak_memory()
        trained = train(options, folder, earlier.saved)
        try:
            result = evaluate(options, checkpoint=str(folder / BEST), folder=folder)
            result |= {"train_hours": trained.hours, "peak_memory_gib": peak_memory_gib()}
            if options.eval.last_step:
                result["last_step"] = evaluate(options, checkpoint=str(folder / LAST), folder=folder / "last")
            if is_rank_zero():
                write_json(folder / "metrics.json", result)
                trained.dashboard.finish(result, checkpoint=folder / BEST)
        finally:
            trained.dashboard.close()
    return result


def as_baseline(options: Options) -> Options:
    """The same run with the head never updated, under a name of its own."""
    changes = {"train.frozen": True, "wandb.name": options.wandb.name + FROZEN}
    if options.wandb.id is not None:
        changes["wandb.id"] = options.wandb.id + FROZEN
    return with_changes(options, changes)


def run_job(job: Job) -> dict[str, dict[str, Any]]:
    """One job of the command line: a run, with `train.compare_frozen` its baseline first."""
    options = as_baseline(job.options) if job.options.train.frozen else job.options
    if job.evaluate_only:
        checkpoint, folder = options.checkpoint or str(run_folder(options)), results_folder(options)
        print(f"{options.wandb.name}: evaluation of {checkpoint}, results in {folder}")
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
    """(setting, result) of what one job has given: its run, its baseline, the last step of each."""
    rows = []
    for name, result in results.items():
        compared = len(results) > 1 and ("frozen" if name.endswith(FROZEN) else "PPAP")
        setting = " ".join(filter(None, (job.setting, compared)))
        rows.append((setting, result))
        if "last_step" in result:
            rows.append((f"{setting}, last step".removeprefix(", "), result["last_step"]))
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs what the command line asks for, one job after another; returns the metrics of each."""
    arguments = parse_arguments(argv, description="Train PPAP and evaluate it.", training=True)
    jobs = plan_jobs(arguments)
    from utils.files import move_aside
    from utils.plots.tables import class_table, metrics_table, sweep_table, write_sweep
    from utils.training.trainer import check_backends

    for job in jobs:
        check_backends(job.options)

    finished, rows = [], []
    for job in jobs:
        results = run_job(job)
        print(f"\n{class_table(results)}\n\n{metrics_table(results)}")
        for name, result in results.items():
            if "train_hours" in result:
                spent = f"{result['train_hours']:.2f} h, {result['peak_memory_gib']:.1f} GiB at most"
                folder = Path(job.options.output_dir) / name
                print(f"{name}: best at step {result['step']}, {spent}, results in {folder}")
        finished.append(list(results.values())[-1])
        rows += sweep_rows(job, results)
        folder = Path(job.options.output_dir) / f"{job.base}-sweep"
        if len(jobs) > 1 and is_rank_zero():  # each time: a sweep that is cut short loses nothing
            if job is jobs[0]:
                move_aside(folder)
            write_sweep(folder, rows)
    if len(jobs) > 1:
        print(f"\n{sweep_table(rows)}\n\nresults of all runs: {folder}")
    return finished


if __name__ == "__main__":
    sys.exit(guarded(main))
