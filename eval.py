"""Evaluates a checkpoint: python eval.py --opt cocostuff_eval.json

Other flags write masks of photographs (--images), plot the propagation of an anchor (--explain), score the
sets of propagation by labels (--measure-sets) and export a checkpoint (--export).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from utils.config.cli import guarded, parse_arguments, plan_jobs
from utils.config.options import Options
from utils.errors import UserError
from utils.files import find_checkpoint
from utils.training.launch import is_rank_zero

# Commands import torch when they start: a mistyped option is reported at once, and the processes of the CRF,
# which import this file again, stay small.


def evaluate(options: Options, *, checkpoint: str | Path, folder: Path) -> dict[str, Any]:
    """Evaluates a checkpoint on the validation split; training ends with this too.

    Writes metrics.json, confusion.npz, predictions.png, confusion.png and class_iou.png.

    Args:
        options: all options.
        checkpoint: a file, a folder, or a run below `output_dir`.
        folder: for results.

    Returns:
        The content of metrics.json: `before_crf` and `after_crf` (the four metrics, or None), `class_iou`,
        `valid_loss`, `images`, `assignment`, `step`, `checkpoint`, `after_crf_missing`.

    Raises:
        UserError: data or checkpoint are missing or do not fit.
    """
    from dataset import build_data
    from model import build_module
    from model.checkpoint import read_checkpoint
    from model.evaluator import no_refiner_reason, open_refiner
    from model.results import evaluation_result, shown_indices, write_pictures
    from utils.files import make_folder, write_json
    from utils.training.device import explained_errors, hardware_settings
    from utils.training.trainer import build_trainer

    data = build_data(options, train=False)
    stored = read_checkpoint(find_checkpoint(str(checkpoint), options.output_dir))
    make_folder(folder)
    images = len(data.validation_set)
    missing = no_refiner_reason(options, labelled=data.validation_labelled)
    with open_refiner(options) if missing is None else nullcontext() as refiner:
        module = build_module(
            options,
            data.labels,
            checkpoint=stored,
            pictured=shown_indices(options.eval.pictures, images),
            refiner=refiner,
        )
        if images:
            trainer = build_trainer(options, hardware_settings(options))
            with explained_errors(options):
                trainer.validate(module, data.evaluation_dataloader(), verbose=False, weights_only=True)
        module.evaluator.finish_refining()
    plain = module.evaluator.compute()
    refined = module.evaluator.compute(refined=True) if missing is None else None
    predictions = module.evaluator.predictions()
    result = {
        "checkpoint": str(stored.path),
        "step": stored.about.get("step"),
        **evaluation_result(plain, refined, names=data.labels.names),
        "after_crf_missing": missing,
    }
    if is_rank_zero():
        write_json(folder / "metrics.json", result)
        write_pictures(folder, data.labels, predictions=predictions, plain=plain, refined=refined)
    return result


def run_folder(options: Options) -> Path:
    """<output_dir>/<wandb.name>, in every wandb mode."""
    return Path(options.output_dir) / options.wandb.name


def results_folder(options: Options) -> Path:
    """The run's folder, or its subfolder `evaluation` if a run was trained there: its results are kept."""
    folder = run_folder(options)
    return folder / "evaluation" if (folder / "options.json").exists() else folder


def measure_sets(options: Options) -> list[dict[str, float]]:
    """--measure-sets: scores the sets of propagation on frozen features by the validation labels."""
    from dataset import build_data
    from model import build_module
    from model.set_quality import measure_sets as measure
    from utils.plots.tables import sets_table

    require_ppap(options, "--measure-sets")
    data, folder = build_data(options, train=False), results_folder(options)
    rows = measure(build_module(options, data.labels), data, folder=folder)
    print(f"\n{sets_table(rows)}\n\nresults: {folder}")
    return rows


def explain(options: Options, *, image: str, patch: tuple[int, int] | None) -> dict[str, Any]:
    """--explain: plots what propagation does for one anchor of an image, on frozen features."""
    from dataset import build_data
    from model import build_module
    from model.explain import explain_image
    from utils.plots.tables import explanation_table

    require_ppap(options, "--explain")
    data, folder = build_data(options, train=False), results_folder(options) / "explain"
    result = explain_image(build_module(options, data.labels), data, image=image, patch=patch, folder=folder)
    print(f"\n{explanation_table(result)}\n\nresults: {folder}")
    return result


def require_ppap(options: Options, flag: str) -> None:
    """Raises a UserError unless the options choose the PPAP loss and a single process."""
    if (loss := options.training_coeff.loss) != "ppap":
        raise UserError(f"training_coeff.loss is {loss}, must be ppap with {flag}")
    if options.trainer.world_size > 1:
        spread = f"{options.trainer.devices} x {options.trainer.num_nodes}"
        raise UserError(f"trainer.devices x trainer.num_nodes is {spread}, must be 1 x 1 with {flag}")


def write_masks(options: Options, arguments: Namespace) -> dict[str, Any]:
    """--images: writes masks of a photograph or of a folder of them."""
    from dataset import known_labels
    from model import load_segmenter
    from model.predictor import predict_folder
    from utils.training.device import device_name

    predictor = load_segmenter(
        options.checkpoint,
        opt=options,
        labels=known_labels(options.dataset),
        device=device_name(options),
        res=arguments.res,
        head=arguments.head or "cluster",
        crf=arguments.crf,
        tile=arguments.tile,
    )
    return predict_folder(predictor, Path(arguments.images), Path(arguments.out), names=arguments.names)


def export(options: Options, path: Path) -> None:
    """--export: writes a checkpoint in the published format."""
    from model.checkpoint import export, read_checkpoint

    found = find_checkpoint(options.checkpoint, options.output_dir)
    export(read_checkpoint(found), path)
    print(f"{found} written in the published format: {path}")


def evaluate_all(jobs: Sequence[Any]) -> list[dict[str, Any]]:
    """Evaluates the checkpoint of each job, and prints tables."""
    from utils.plots.tables import class_table, metrics_table, sweep_table

    for job in jobs:  # all before the first one starts
        find_checkpoint(job.options.checkpoint, job.options.output_dir)
    results = []
    for job in jobs:
        name, folder = job.options.wandb.name, results_folder(job.options)
        result = evaluate(job.options, checkpoint=job.options.checkpoint, folder=folder)
        print(f"\n{class_table({name: result})}\n\n{metrics_table({name: result})}\n\nresults: {folder}")
        results.append(result)
    if len(jobs) > 1:
        print("\n" + sweep_table([(job.setting, result) for job, result in zip(jobs, results, strict=True)]))
    return results


def main(argv: Sequence[str] | None = None) -> list[Any]:
    """Runs the command that the flags choose, once per job."""
    arguments = parse_arguments(argv, description="Evaluate a PPAP checkpoint.", training=False)
    jobs = plan_jobs(arguments)
    if arguments.export:
        return [export(jobs[0].options, Path(arguments.export))]
    if arguments.measure_sets:
        return [measure_sets(job.options) for job in jobs]
    if arguments.explain is not None:
        return [explain(job.options, image=arguments.explain, patch=arguments.patch) for job in jobs]
    if arguments.images is not None:
        return [write_masks(job.options, arguments) for job in jobs]
    return evaluate_all(jobs)


if __name__ == "__main__":
    sys.exit(guarded(main, then="repeat the command"))
