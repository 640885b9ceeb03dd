"""Trains PPAP and evaluates it: python run.py --opt cocostuff.json

options -> data -> network -> loss and probes -> best checkpoint -> metrics before and after CRF
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import evaluate, results_folder
from utils.config.cli import Job, guarded, parse_arguments, plan_jobs, print_options
from utils.config.loading import with_changes
from utils.config.options import FROZEN, Options
from utils.training.launch import is_rank_zero

if TYPE_CHECKING:
    from model.callbacks import HtmlReport, WandbImages
    from utils.training.run_dir import RunDir

EXAMPLES = """\
  python run.py --opt demo.json
  python run.py --opt cocostuff.json --data_path <cocostuff> --resume
  python run.py --opt demo.json training_coeff.prop_iter=0,1,2 train.seed=0,1,2"""

# Commands import torch lazily, so that a mistyped option is reported at once.


def train(options: Options, run_dir: RunDir) -> tuple[float, HtmlReport, WandbImages]:
    """Trains or resumes one run; returns its training seconds and the callbacks that report results."""
    from dataset import build_data
    from model import build_module
    from model.callbacks import HtmlReport, WandbImages
    from model.checkpoint import read_checkpoint
    from model.results import shown_indices
    from utils.files import find_checkpoint
    from utils.training.checkpointing import CheckpointManager
    from utils.training.device import explained_errors, hardware_settings
    from utils.training.loggers import build_loggers, wandb_runs
    from utils.training.stopping import StopSignal
    from utils.training.trainer import build_trainer

    hardware, data = hardware_settings(options), build_data(options)
    start = options.checkpoint and read_checkpoint(find_checkpoint(options.checkpoint, options.output_dir))
    validation, labelled = data.validation_set, data.train_labelled
    indices = shown_indices(options.eval.pictures, len(validation))
    known = {"checkpoint": start or None, "train_labelled": labelled, "pictured": indices}
    module = build_module(options, data.labels, **known)
    if not labelled:
        print("train data has no labels: no linear probe")
    checkpoint, progress = run_dir.resume_point(options)
    if checkpoint is None:
        run_dir.prepare(options, data.damaged)
    loggers = build_loggers(options, run_dir.path, step=progress.step, wandb_id=progress.wandb_id)
    shown = [(validation.name(index), validation[index].image) for index in indices]
    images = WandbImages(wandb_runs(loggers), shown, best=progress.best)
    report = HtmlReport(run_dir.path, data.labels, shown)
    with StopSignal() as stop, explained_errors(options):
        checkpoints = CheckpointManager(
            run_dir.path,
            every=options.train.checkpoint_interval,
            validates=len(validation) > 0,
            stop=stop,
            progress=progress,
        )
        trainer = build_trainer(options, hardware, loggers=loggers, callbacks=[images, report, checkpoints])
        if options.dataset.cache_features:
            backbone, precision = module.segmenter.backbone, trainer.precision_plugin.precision
            encode = partial(module.frozen_tokens, trainer=trainer)
            where = {"precision": precision, "device": trainer.strategy.root_device}
            data = data.with_tokens(encode, backbone=backbone, **where)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return checkpoints.spent, report, images


def train_and_evaluate(options: Options) -> dict[str, Any]:
    """One run from data to metrics.json and report.html; returns the content of metrics.json."""
    import wandb

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
        try:
            seconds, report, images = train(options, run_dir)
            result = evaluate(options, checkpoint=run_dir.best, folder=run_dir.path)
            result |= {"train_hours": seconds / 3600, "peak_memory_gib": peak_memory_gib()}
            if options.eval.last_step:
                last = run_dir.path / "last"
                result["last_step"] = evaluate(options, checkpoint=run_dir.last, folder=last)
            run_dir.write_metrics(result)
            if is_rank_zero():
                report.finish(result)
                artifact = run_dir.best if options.wandb.artifact else None
                images.finish(result, folder=run_dir.path, artifact=artifact)
        finally:
            wandb.finish()  # so that the next run of a sweep gets its own
    return result


def as_baseline(options: Options) -> Options:
    """The frozen baseline of a run, under its own name."""
    names = {"wandb.name": options.wandb.name + FROZEN}
    if options.wandb.id is not None:
        names["wandb.id"] = options.wandb.id + FROZEN
    return with_changes(options, {"train.frozen": True, **names})


def run_job(job: Job) -> dict[str, dict[str, Any]]:
    """Runs one job; with `train.compare_frozen`, its frozen baseline first."""
    options = as_baseline(job.options) if job.options.train.frozen else job.options
    name = options.wandb.name
    if job.evaluate_only:
        checkpoint, folder = options.checkpoint or f"{options.output_dir}/{name}", results_folder(options)
        print(f"{name}: evaluating {checkpoint}, results in {folder}")
        return {name: evaluate(options, checkpoint=checkpoint, folder=folder)}
    compares = options.train.compare_frozen and not options.train.frozen
    results = {}
    for each in [as_baseline(options), options] if compares else [options]:
        print(f"\n{each.wandb.name}: {'frozen baseline' if each.train.frozen else 'PPAP'}")
        results[each.wandb.name] = train_and_evaluate(each)
    return results


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs all jobs of a command line, one after another; returns the metrics of each."""
    arguments = parse_arguments(
        argv, description="Train PPAP and evaluate it.", examples=EXAMPLES, training=True
    )
    jobs = plan_jobs(arguments)
    if arguments.print_options:
        return print_options(jobs)
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
            compared = len(results) > 1 and ("frozen" if name.endswith(FROZEN) else "PPAP")
            setting = " ".join(filter(None, (job.setting, compared)))
            rows.append((setting, result))
            if "last_step" in result:
                rows.append((f"{setting}, last step".removeprefix(", "), result["last_step"]))
        finished.append(result)
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
