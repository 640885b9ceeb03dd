"""Evaluates a checkpoint: python eval.py --opt cocostuff_eval.json

option file -> data -> network from the checkpoint -> predictions -> metrics before and after CRF -> report
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import guarded, parse_arguments, plan_jobs
from utils.files import find_checkpoint
from utils.options import Options

if TYPE_CHECKING:
    from model import PPAPModule
    from model.evaluator import Evaluation

# What needs torch is imported inside functions: a mistyped option is answered at once, and the CRF
# processes, which import this file again, stay small.


def evaluate(options: Options, *, checkpoint: str, folder: Path) -> dict[str, Any]:
    """Evaluates a checkpoint on the validation split; run.py ends with this too.

    Writes metrics.json, confusion.npz, predictions.png and confusion.png.

    Args:
        options: all options.
        checkpoint: a file, a folder, or a run below `output_dir`.
        folder: where results go.

    Returns:
        What metrics.json holds: `before_crf` and `after_crf` (the four metrics, or None), `class_iou`,
        `valid_loss`, `images`, `assignment`, `step`, `checkpoint`, `after_crf_missing`.

    Raises:
        UserError: data or checkpoint are missing or do not fit.
    """
    from dataset import build_data
    from model import build_module
    from utils.files import make_folder, write_json

    data = build_data(options, train=False)
    module = build_module(options, data.labels, checkpoint=checkpoint)
    make_folder(folder)
    plain, refined, missing = predict(options, module, data)
    result = {
        "checkpoint": module.restored_from,
        "step": module.restored_step,
        "images": plain.images,
        "valid_loss": plain.valid_loss,
        "before_crf": plain.metrics() or None,
        "after_crf": (refined.metrics() or None) if refined else None,
        "after_crf_missing": missing,
        "class_iou": {
            stage: class_iou(evaluation, data.labels.names)
            for stage, evaluation in (("before_crf", plain), ("after_crf", refined))
        },
        "assignment": list(plain.cluster.assignment) if plain.cluster else None,
    }
    write_json(folder / "metrics.json", result)
    write_pictures(folder, module, plain, refined)
    return result


def predict(
    options: Options, module: PPAPModule, data: Any
) -> tuple[Evaluation, Evaluation | None, str | None]:
    """Runs the network over the validation split while other processes refine what it has predicted.

    Returns:
        Scores before CRF; scores after CRF or None; and why there are none.
    """
    from tqdm import tqdm

    from utils.crf import CrfPool, crf_missing
    from utils.training import build_trainer

    missing = crf_missing() if options.eval.is_crf else "eval.is_crf is false"
    evaluator = module.evaluator
    evaluator.pictures_wanted = options.eval.pictures
    with CrfPool(options.eval.crf_workers) if missing is None else nullcontext() as pool:
        evaluator.pool = pool
        if len(data.validation_set):
            trainer = build_trainer(options)
            trainer.validate(module, data.evaluation_dataloader(), verbose=False, weights_only=True)
        if pool is not None:
            with tqdm(total=evaluator.images, desc="CRF", unit="image") as bar:
                bar.update(evaluator.images - len(pool))
                while waiting := len(pool):
                    bar.update(waiting - evaluator.collect_refined(wait_for_one=True))
        evaluator.pool = None
    return evaluator.compute(), evaluator.compute(refined=True) if missing is None else None, missing


def class_iou(evaluation: Evaluation | None, names: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """Head -> class name -> IoU in percent, of the heads that have scores."""
    if evaluation is None:
        return None
    heads = (("cluster", evaluation.cluster), ("linear", evaluation.linear))
    return {head: dict(zip(names, scores.iou, strict=True)) for head, scores in heads if scores is not None}


def write_pictures(folder: Path, module: PPAPModule, plain: Evaluation, refined: Evaluation | None) -> None:
    """confusion.npz and confusion.png for all that was scored, predictions.png for the first images."""
    import numpy as np

    from utils.pictures import UNMATCHED, colour, draw_confusion, draw_predictions

    confusions = {
        f"{head}{suffix}": scores.confusion
        for suffix, evaluation in (("", plain), ("_crf", refined))
        if evaluation is not None
        for head, scores in (("cluster", evaluation.cluster), ("linear", evaluation.linear))
        if scores is not None
    }
    if confusions:
        np.savez(folder / "confusion.npz", class_names=np.array(module.labels.names), **confusions)
        shown = {name: counts for name, counts in confusions.items() if not name.endswith("_crf")}
        draw_confusion(folder / "confusion.png", shown, module.labels)
    if not module.evaluator.pictures:
        return
    n_clusters = module.cluster_probe.clusters.shape[0]
    assignment = np.array(plain.cluster.assignment if plain.cluster else range(n_clusters))
    rows = []
    for prediction in module.evaluator.pictures:
        row = {"image": prediction.image.permute(1, 2, 0).numpy()}
        if plain.cluster:
            row["truth"] = colour(prediction.label.numpy(), module.labels)
        clusters = assignment[prediction.cluster.numpy()] % module.labels.n_classes
        clusters = np.where(assignment[prediction.cluster.numpy()] < 0, -1, clusters)
        row["clusters"] = colour(clusters, module.labels, missing=UNMATCHED)
        if prediction.linear is not None:
            row["linear probe"] = colour(prediction.linear.numpy(), module.labels)
        rows.append(row)
    draw_predictions(folder / "predictions.png", rows, module.labels)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Evaluates what the command line asks for, one job after another."""
    arguments = parse_arguments(argv, description="Evaluate a PPAP checkpoint.", training=False)
    jobs = plan_jobs(arguments)
    for job in jobs:
        find_checkpoint(job.options.checkpoint, job.options.output_dir)  # named at all?
    from utils.report import class_table, metrics_table, sweep_table

    results = []
    for job in jobs:
        name = job.options.wandb.name
        folder = Path(job.options.output_dir) / name
        result = evaluate(job.options, checkpoint=job.options.checkpoint, folder=folder)
        print(f"\n{class_table({name: result})}\n\n{metrics_table({name: result})}\n\nresults: {folder}")
        results.append(result)
    if len(jobs) > 1:
        print("\n" + sweep_table([(job.setting, result) for job, result in zip(jobs, results, strict=True)]))
    return results


if __name__ == "__main__":
    sys.exit(guarded(main))
