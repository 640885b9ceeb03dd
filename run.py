"""Trains PPAP, STEGO or HP and evaluates it: python run.py --opt cocostuff.json

options -> data -> network -> loss and probes -> best checkpoint -> metrics before and after CRF
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, exit_on_signals

if __name__ == "__main__":  # before the imports that take time
    exit_on_signals()

from eval import evaluate, require_ppap, results_folder, with_any_classes
from utils.config.cli import Job, guarded, parse_arguments, plan_jobs, print_options
from utils.config.loading import with_changes
from utils.config.options import FROZEN, Options
from utils.progress import COLUMNS, duration
from utils.training.launch import is_rank_zero
from utils.vision.images import spread_indices

if TYPE_CHECKING:
    from model.callbacks import HtmlReport, WandbImages
    from utils.training.run_dir import RunDir

EXAMPLES = """\
  python run.py --opt demo.json
  python run.py --opt cocostuff.json --data_path <cocostuff> --resume
  python run.py --opt demo.json training_coeff.prop_iter=0,1,2 train.seed=0,1,2"""

# Commands import torch lazily, so that a mistyped option is reported at once.


def train(
    options: Options, run_dir: RunDir, longer: dict[str, int]
) -> tuple[dict[str, Any], HtmlReport, WandbImages]:
    """Trains or resumes one run; returns its cost and the callbacks that report results."""
    from dataset import build_data
    from model import build_module
    from model.callbacks import HtmlReport, ReferenceImages, WandbImages
    from model.checkpoint import open_checkpoint
    from model.results import run_summary, training_cost
    from utils.training.checkpointing import CheckpointManager
    from utils.training.device import explained_errors, hardware_settings
    from utils.training.loggers import build_loggers, wandb_runs
    from utils.training.stopping import StopSignal
    from utils.training.trainer import build_trainer

    hardware, data = hardware_settings(options), build_data(options)
    start = options.checkpoint and open_checkpoint(options.checkpoint, options.output_dir)
    validation = data.validation_set
    indices = spread_indices(options.eval.pictures, len(validation))
    known = {"checkpoint": start or None, "train_labelled": data.train_labelled, "pictured": indices}
    module = build_module(options, data.labels, **known)
    inventory = data.inventory() if is_rank_zero() else {}
    run_dir.check_data(inventory, options)
    checkpoint, progress = run_dir.resume_point(options)
    if checkpoint is None:
        run_dir.prepare(options, data.damaged, inventory)
    else:
        run_dir.extend(options, longer)
    loggers = build_loggers(options, run_dir.path, step=progress.step, wandb_id=progress.wandb_id)
    shown = [(validation.name(index), validation[index].image) for index in indices]
    images, report = WandbImages(wandb_runs(loggers), shown), HtmlReport(run_dir.path, data.labels, shown)
    with StopSignal() as stop, explained_errors():
        checkpoints = CheckpointManager(
            run_dir.path,
            every=options.train.checkpoint_interval,
            validates=len(validation) > 0,
            stop=stop,
            progress=progress,
        )
        callbacks = [ReferenceImages(), images, report, checkpoints]
        trainer = build_trainer(options, hardware, loggers=loggers, callbacks=callbacks)
        print(run_summary(module, data, trainer, folder=run_dir.path))
        frozen = {"backbone": module.segmenter.backbone, "precision": trainer.precision_plugin.precision}
        if options.dataset.cache_features:
            encode = partial(module.frozen_tokens, trainer=trainer)
            data = data.with_tokens(encode, device=trainer.strategy.root_device, **frozen)
        if module.method.neighbours:
            data = data.with_neighbours(partial(module.frozen_features, trainer=trainer), **frozen)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return training_cost(module, run_dir.path, seconds=checkpoints.spent), report, images


def train_and_evaluate(options: Options) -> dict[str, Any]:
    """One run from data to metrics.json and report.html; returns the content of metrics.json."""
    import wandb

    from utils.training.device import peak_memory_gib, reset_peak_memory
    from utils.training.run_dir import RunDir

    run_dir = RunDir(options)
    with run_dir.lock():
        longer: dict[str, int] = {}
        if options.resume is not None:
            longer = run_dir.check_options(options)
            if not longer and (finished := run_dir.final_metrics()) is not None:
                print(f"{run_dir.path}: this run is finished")
                return finished
        reset_peak_memory()
        try:
            cost, report, images = train(options, run_dir, longer)
            gc.collect()  # trainer and data refer to each other, and the tokens can be large
            result = evaluate(options, checkpoint=run_dir.path, folder=run_dir.path)  # best.ckpt
            result |= cost | {"peak_memory_gib": peak_memory_gib()}
            if options.eval.last_step:
                last = run_dir.path / "last"
                result["last_step"] = evaluate(options, checkpoint=run_dir.last, folder=last)
            if is_rank_zero():
                report.finish(result)
                artifact = run_dir.best if options.wandb.artifact else None
                images.finish(result, folder=run_dir.path, artifact=artifact)
                run_dir.write_metrics(result)  # last: the run then counts as finished
        finally:
            if options.wandb.mode != "disabled":  # otherwise the run is a notebook's own
                wandb.finish()  # so that the next run of a sweep gets its own
    return result


def suggest_boundaries(options: Options) -> dict[str, Any]:
    """--suggest: estimates the boundaries of propagation, without labels; returns suggest.json's content."""
    from dataset import build_data
    from model import build_module
    from model.suggest import suggest
    from utils.plots.tables import suggestion_table

    require_ppap(options, flag="--suggest")
    options, folder = with_any_classes(options), Path(options.output_dir) / f"{options.wandb.name}-suggest"
    data = build_data(with_changes(options, {"dataloader.batch_size": options.trainer.world_size}))
    result = suggest(build_module(options, data.labels), data, folder=folder)
    print(f"\n{suggestion_table(result)}\n\nresults: {folder}")
    return result


def as_baseline(options: Options) -> Options:
    """The frozen baseline of a run, under its own name."""
    name, run_id = options.wandb.name + FROZEN, options.wandb.id and options.wandb.id + FROZEN
    return with_changes(options, {"train.frozen": True, "wandb.name": name, "wandb.id": run_id})


def planned_runs(job: Job, *, evaluate_only: bool) -> list[tuple[str, Options]]:
    """Setting and options of each run of a job; with `train.compare_frozen`, its baseline comes first."""
    setting, options = job.setting, job.options
    if options.trained_by == "frozen":
        return [(setting, as_baseline(options))]
    if evaluate_only or not options.train.compare_frozen:
        return [(setting, options)]
    runs = {"frozen": as_baseline(options), trained_with(options): options}
    return [(f"{setting} {kind}".strip(), each) for kind, each in runs.items()]


def trained_with(options: Options) -> str:
    """Name of the method, or of the registered loss that replaces PPAP's."""
    method = options.trained_by
    return options.training_coeff.loss if method == "ppap" else method


def run_one(options: Options, *, evaluate_only: bool) -> dict[str, Any]:
    """Trains and evaluates, or evaluates only."""
    if not evaluate_only:
        return train_and_evaluate(options)
    checkpoint = options.checkpoint or f"{options.output_dir}/{options.wandb.name}"
    folder = results_folder(options)
    print(f"evaluating {checkpoint}, results in {folder}")
    return evaluate(options, checkpoint=checkpoint, folder=folder)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs all jobs of a command line, one after another; returns the metrics of each."""
    about = {"description": "Train PPAP, STEGO or HP and evaluate it.", "examples": EXAMPLES}
    arguments = parse_arguments(argv, **about, training=True)
    jobs = plan_jobs(arguments)
    if arguments.print_options:
        return print_options(jobs)
    if arguments.suggest:
        return [suggest_boundaries(job.options) for job in jobs]
    from utils.files import move_aside
    from utils.plots.report import write_sweep
    from utils.plots.tables import sweep_table

    planned = [planned_runs(job, evaluate_only=arguments.test) for job in jobs]
    finished, rows, done, spent = [], [], 0, 0.0
    total, logged = sum(map(len, planned)), not arguments.test and jobs[0].options.wandb.mode != "disabled"
    if logged and total > 1 and os.environ.get("WANDB_RUN_ID"):  # set by `wandb agent`
        fix = "unset it or, for a run and its baseline, set train.compare_frozen=false"
        raise UserError(f"WANDB_RUN_ID is set, so wandb would merge the {total} runs; {fix}")
    for job, runs in zip(jobs, planned, strict=True):
        results = {}
        for setting, options in runs:
            left, began = spent / max(1, done) * (total - done), time.monotonic()
            place = f", run {done + 1} of {total}" + (f", about {duration(left)} left" if done else "")
            print(f"\n{options.wandb.name}: {trained_with(options)}{place if total > 1 else ''}")
            results[options.wandb.name] = result = run_one(options, evaluate_only=arguments.test)
            rows.append((setting, result | {"name": options.wandb.name}))
            if "last_step" in result:
                rows.append((f"{setting}, last step".removeprefix(", "), result["last_step"]))
            done += 1
            # of a run that was finished before, the time it took then
            spent += max(time.monotonic() - began, 3600 * result.get("train_hours", 0))
        print(closing_words(job, results, alone=len(jobs) == 1))
        finished.append(result)
        folder = Path(job.options.output_dir) / f"{job.base}-sweep"
        if len(jobs) > 1 and is_rank_zero():  # after each job: an interrupted sweep keeps its results
            if job is jobs[0]:
                move_aside(folder)
            write_sweep(folder, rows, title=job.base)
    if len(jobs) > 1:
        print(f"\n{sweep_table(rows)}\n\nreport: {folder / 'report.html'}")
    return finished


def closing_words(job: Job, results: dict[str, dict[str, Any]], *, alone: bool) -> str:
    """Tables of a job, its time and memory, and the next commands; `alone` unless it is part of a sweep."""
    from utils.plots.tables import class_table, metrics_table

    name, result = list(results.items())[-1]
    parts = ["", *([class_table(result), ""] if alone else []), metrics_table(results)]
    if "train_hours" in result:
        folder = Path(job.options.output_dir) / name
        spent, memory = duration(3600 * result["train_hours"]), f"{result['peak_memory_gib']:.1f} GiB"
        which = "best at step" if result["before_crf"] else "last step"
        parts += [f"\n{name}: {which} {result['step']}, trained in {spent}, peak memory {memory}"]
        parts += [f"report: {folder / 'report.html'}"]
        trust = " --trust-plugins" if job.options.plugins else ""
        parts += [f"masks:  python eval.py --checkpoint {folder}{trust} --images <folder> --out <masks>"]
    if "warning" in result:
        parts += ["", fill(result["warning"], COLUMNS, break_on_hyphens=False)]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(guarded(main))
