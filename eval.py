"""Evaluates a checkpoint: python eval.py --opt cocostuff_eval.json

option file -> data -> network from the checkpoint -> predictions -> metrics before and after CRF -> report
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.cli import guarded, parse_arguments, plan_jobs
from utils.config.options import Options
from utils.errors import LeftOut, UserError
from utils.files import find_checkpoint
from utils.training.launch import is_rank_zero

if TYPE_CHECKING:
    from argparse import Namespace

    from dataset.datamodule import SegmentationDataModule
    from model import PPAPModule
    from model.evaluator import Evaluation
    from utils.plots.photographs import Masked
    from utils.vision.crf import CrfPool
    from utils.vision.labels import LabelSpace
    from utils.vision.mean_field import MeanField

# What needs torch is imported inside functions: a mistyped option is answered at once, and the CRF
# processes, which import this file again, stay small.


def evaluate(options: Options, *, checkpoint: str, folder: Path) -> dict[str, Any]:
    """Evaluates a checkpoint on the validation split; run.py ends with this too.

    Writes metrics.json, confusion.npz, predictions.png, confusion.png and class_iou.png.

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
    from model.checkpoint import read_checkpoint
    from model.results import class_iou, write_pictures
    from utils.files import make_folder, write_json

    data = build_data(options, train=False)
    restored = read_checkpoint(find_checkpoint(checkpoint, options.output_dir))
    make_folder(folder)
    module, predicted = predict(options, restored, data=data)
    stages = {"before_crf": predicted.plain, "after_crf": predicted.refined}
    assigned = predicted.plain.cluster
    result = {
        "checkpoint": str(restored.path),
        "step": restored.about.get("step"),
        "images": predicted.plain.images,
        "valid_loss": predicted.plain.valid_loss,
        **{stage: evaluation and (evaluation.metrics() or None) for stage, evaluation in stages.items()},
        "after_crf_missing": predicted.missing,
        "class_iou": {
            stage: evaluation and class_iou(evaluation, data.labels.names)
            for stage, evaluation in stages.items()
        },
        "assignment": list(assigned.assignment) if assigned else None,
    }
    if is_rank_zero():
        write_json(folder / "metrics.json", result)
        write_pictures(
            folder,
            module,
            plain=predicted.plain,
            refined=predicted.refined,
            predictions=predicted.predictions,
        )
    return result


def run_folder(options: Options) -> Path:
    """<output_dir>/<wandb.name>, in every wandb mode."""
    return Path(options.output_dir) / options.wandb.name


def results_folder(options: Options) -> Path:
    """The run's folder; a folder `evaluation` in it where that run was trained, whose results are kept."""
    folder = run_folder(options)
    return folder / "evaluation" if (folder / "options.json").exists() else folder


@dataclass(frozen=True)
class Predicted:
    """Scores before CRF; scores after CRF, or None and why there are none."""

    plain: Evaluation
    refined: Evaluation | None
    missing: str | None
    predictions: list


def why_no_crf(options: Options, data: SegmentationDataModule) -> str | None:
    """The reason why there is nothing to refine or nothing to refine it with, or None."""
    from utils.vision.crf import crf_missing

    if not options.eval.is_crf:
        return "eval.is_crf is false"
    if not data.validation_labelled:
        return "the validation split has no labels"
    return crf_missing() if options.eval.crf_backend == "pydensecrf" else None


def open_refiner(options: Options) -> AbstractContextManager[CrfPool | MeanField]:
    """What refines predictions: processes, or the device of the network itself."""
    from utils.vision.crf import resolve_backend

    if resolve_backend(options.eval.crf_backend) == "torch":
        from utils.vision.mean_field import MeanField

        return nullcontext(MeanField())
    from utils.training.launch import cores
    from utils.vision.crf import CrfPool

    share = max(1, cores() // options.trainer.devices)  # each process of a machine has a pool of its own
    return CrfPool(options.eval.crf_workers or share)


def predict(options: Options, restored, *, data: SegmentationDataModule):
    from tqdm import tqdm

    from model import build_module
    from utils.training.faults import faults_told
    from utils.training.shown import shown_places
    from utils.training.trainer import build_trainer, hardware_settings

    missing = why_no_crf(options, data)
    images = len(data.validation_set)
    with open_refiner(options) if missing is None else nullcontext() as refiner:
        module = build_module(
            options,
            data.labels,
            checkpoint=restored,
            pictured=shown_places(options.eval.pictures, images),
            refiner=refiner,
        )
        evaluator = module.evaluator
        if images:
            trainer = build_trainer(options, hardware_settings(options))
            with faults_told(options):
                trainer.validate(module, data.evaluation_dataloader(), verbose=False, weights_only=True)
        if refiner is not None:
            with tqdm(total=evaluator.images, desc="CRF", unit="image", disable=not is_rank_zero()) as bar:
                bar.update(evaluator.images - len(refiner))
                while waiting := len(refiner):
                    bar.update(waiting - evaluator.collect_refined(wait_for_one=True))
    refined = evaluator.compute(refined=True) if missing is None else None
    return module, Predicted(evaluator.compute(), refined, missing, evaluator.predictions())


def measure_sets(options: Options, *, folder: Path) -> list[dict[str, float]]:
    """Holds the sets that propagation chooses on frozen features against the validation labels.

    Nothing is trained and no checkpoint is read; batch size, anchors and boundaries are as in training, the
    images are those of validation at `dataset.val_res`, and there is no dropout. Writes sets.json and
    sets.png.

    Args:
        options: all options.
        folder: where results go.

    Returns:
        For t = 0..T what `SetQuality.means` gives, in percent.

    Raises:
        UserError: the validation split has no labels, or data or weights are missing or do not fit.
    """
    from dataset import build_data
    from model import build_module
    from model.set_quality import measured
    from utils.files import make_folder, write_json
    from utils.plots.figures import draw_sets

    data = build_data(options, train=False)
    if not data.validation_labelled:
        raise UserError(
            f"dataset.data_path is {options.dataset.data_path}: its validation split has no labels, "
            "so there is nothing to hold the sets against; add labels"
        )
    need_ppap(options, "--measure-sets")
    need_one_process(options, "--measure-sets")
    rows = measured(build_module(options, data.labels), data.validation_set)
    make_folder(folder)
    write_json(folder / "sets.json", rows)
    draw_sets(
        folder / "sets.png", rows, title=f"{options.dataset.data_type}, {data.labels.n_classes} classes"
    )
    return rows


def need_ppap(options: Options, flag: str) -> None:
    """Raises a UserError where another loss, which propagates nothing, was chosen."""
    if (chosen := options.training_coeff.loss) != "ppap":
        raise UserError(f"training_coeff.loss is {chosen}, must be ppap with {flag}")


def explain(options: Options, *, image: str, patch: tuple[int, int] | None, folder: Path) -> dict[str, Any]:
    """Draws what propagation does for one anchor of an image, on frozen features.

    Nothing is trained and no checkpoint is read; the bank is as large as a training batch, at
    `dataset.val_res`, without dropout. Writes <image>_<row>_<col>.png, and adds to explain.json.

    Args:
        options: all options.
        image: an image file, or the index of a validation image.
        patch: (row, column) of the anchor on the patch grid, from 0; None takes the centre.
        folder: where results go.

    Returns:
        `image`, `patch`, `grid`, `images` (of the bank) and `steps` (`Explanation.numbers`).

    Raises:
        UserError: there is no such image or patch, or data or weights are missing or do not fit.
    """
    from dataset import build_data
    from dataset.bank import bank_images
    from model import build_module
    from model.explain import explain_images
    from utils.files import make_folder, read_json_object, write_json
    from utils.plots.explain_figure import draw_explanation

    need_ppap(options, "--explain")
    need_one_process(options, "--explain")
    data = build_data(options, train=False)
    asked = bank_images(data, image, size=options.dataloader.batch_size)
    found = explain_images(build_module(options, data.labels), asked.images, patch=patch)
    _, row, column = found.anchor
    name = re.sub(r"[^\w.=+-]+", "_", f"{Path(asked.names[0]).stem}_{row}_{column}")
    pictures = asked.images.permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    file = make_folder(folder) / "explain.json"
    draw_explanation(folder / f"{name}.png", found, pictures=pictures, names=asked.names, about=asked.about)
    result = {
        "image": asked.names[0],
        "patch": [row, column],
        "grid": list(found.grid),
        "images": len(pictures),
        "steps": found.numbers(),
    }
    write_json(file, (read_json_object(file) if file.exists() else {}) | {name: result})
    return result


def need_one_process(options: Options, flag: str) -> None:
    """Raises a UserError where several processes were asked for."""
    if options.trainer.world_size > 1:
        wanted = f"{options.trainer.devices} x {options.trainer.num_nodes}"
        raise UserError(f"trainer.devices x trainer.num_nodes is {wanted}, must be 1 x 1 with {flag}")


def _classes(options: Options) -> LabelSpace | None:
    """The data set's classes; None where it takes its files to know them."""
    from dataset import DATA_SETS

    try:
        return DATA_SETS[options.dataset.data_type].labels(options.dataset)
    except UserError:
        return None


def _masked(options: Options, arguments: Namespace) -> Masked:
    from model.masking import mask

    result = mask(options, arguments, labels=_classes(options))
    speed = result.images / max(result.seconds, 1e-9)
    print(f"\n{result.images} images, {speed:.2f} images/s\n\nresults: {arguments.out}")
    if result.left_out:
        raise LeftOut(result.left_out, f"{arguments.images}; the other {result.images} images are done")
    return result


def _measured(options: Options) -> list[dict[str, float]]:
    from utils.plots.tables import sets_table

    folder = results_folder(options)
    rows = measure_sets(options, folder=folder)
    print(f"\n{sets_table(rows)}\n\nresults: {folder}")
    return rows


def _explained(options: Options, *, image: str, patch: tuple[int, int] | None) -> dict[str, Any]:
    from utils.plots.tables import explanation_table

    folder = results_folder(options) / "explain"
    result = explain(options, image=image, patch=patch, folder=folder)
    print(f"\n{explanation_table(result)}\n\nresults: {folder}")
    return result


def export_published(arguments: Namespace) -> None:
    """Writes the checkpoint that the command line names in the published format.

    Raises:
        UserError: there is none, or it cannot be written.
    """
    from model.checkpoint import export, read_checkpoint

    options = plan_jobs(arguments)[0].options  # a sweep's jobs differ in what a checkpoint has not
    found = find_checkpoint(options.checkpoint, options.output_dir)
    export(read_checkpoint(found), Path(arguments.export))
    print(f"{found} written in the published format: {arguments.export}")


def main(argv: Sequence[str] | None = None) -> list[Any]:
    """Evaluates what the command line asks for, one job after another."""
    arguments = parse_arguments(argv, description="Evaluate a PPAP checkpoint.", training=False)
    if arguments.export:
        export_published(arguments)
        return []
    jobs = plan_jobs(arguments)
    if arguments.measure_sets:
        return [_measured(job.options) for job in jobs]
    if arguments.explain is not None:
        return [_explained(job.options, image=arguments.explain, patch=arguments.patch) for job in jobs]
    if arguments.images is not None:
        return [_masked(job.options, arguments) for job in jobs]
    for job in jobs:
        find_checkpoint(job.options.checkpoint, job.options.output_dir)  # named at all?
    from utils.plots.tables import class_table, metrics_table, sweep_table
    from utils.training.trainer import check_backends

    for job in jobs:
        check_backends(job.options)
    results = []
    for job in jobs:
        name = job.options.wandb.name
        folder = results_folder(job.options)
        result = evaluate(job.options, checkpoint=job.options.checkpoint, folder=folder)
        print(f"\n{class_table({name: result})}\n\n{metrics_table({name: result})}\n\nresults: {folder}")
        results.append(result)
    if len(jobs) > 1:
        print("\n" + sweep_table([(job.setting, result) for job, result in zip(jobs, results, strict=True)]))
    return results


if __name__ == "__main__":
    sys.exit(guarded(main, then="repeat the command"))
