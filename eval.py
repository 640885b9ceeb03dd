"""Evaluates a checkpoint: python eval.py --opt cocostuff_eval.json

Other flags write masks of photographs (--images), plot the propagation of an anchor (--explain), write a page
to explore it (--explore), compare its sets with labels (--measure-sets) and export a checkpoint (--export).
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from utils.errors import UserError, exit_on_signals

if __name__ == "__main__":  # before the imports that take time
    exit_on_signals()

from utils.config.cli import guarded, parse_arguments, parse_overrides, plan_jobs, print_options
from utils.config.loading import with_changes
from utils.config.options import Options
from utils.training.launch import is_rank_zero
from utils.vision.crf import crf_missing
from utils.vision.images import spread_indices
from utils.vision.labels import LabelSpace

EXAMPLES = """\
  python eval.py --checkpoint demo
  python eval.py --checkpoint demo --images photographs --out masks
  python eval.py --opt cocostuff_eval.json --data_path <cocostuff>"""

NO_CLASSES = LabelSpace(("unknown",), ((0, 0, 0),))  # of photographs without a data set

# Commands import torch lazily, so that a mistyped option is reported at once and the CRF's processes, which
# import this file again, stay small.


def evaluate(options: Options, *, checkpoint: str | Path, folder: Path) -> dict[str, Any]:
    """Evaluates a checkpoint on the validation split; returns the content of metrics.json.

    `checkpoint` is a file, a folder or a run below `output_dir`; figures and metrics are written to `folder`.
    """
    from dataset import build_data
    from model import build_module
    from model.checkpoint import open_checkpoint
    from model.evaluator import open_refiner
    from model.results import cluster_shares, evaluation_result, write_pictures
    from utils.files import make_folder, write_json, write_text
    from utils.plots.tables import metrics_markdown
    from utils.training.device import explained_errors
    from utils.training.trainer import build_trainer

    stored = open_checkpoint(str(checkpoint), options.output_dir)
    data = build_data(options, train=False)
    make_folder(folder)
    missing = _why_no_crf(options, labelled=data.validation_labelled)
    pictured = spread_indices(options.eval.pictures, len(data.validation_set))
    with nullcontext() if missing else open_refiner(options) as refiner:
        module = build_module(options, data.labels, checkpoint=stored, pictured=pictured, refiner=refiner)
        with explained_errors():
            if len(data.validation_set):
                trainer = build_trainer(options)
                trainer.validate(module, data.evaluation_dataloader(), verbose=False, weights_only=True)
            module.evaluator.finish_refining()
    plain, predictions = module.evaluator.compute(), module.last_predictions
    refined = None if missing else module.evaluator.compute(refined=True)
    result = {"checkpoint": str(stored.path), "step": stored.about.get("step")}
    result |= evaluation_result(plain, refined, names=data.labels.names) | {"after_crf_missing": missing}
    if not data.validation_labelled:
        result["cluster_shares"] = cluster_shares(predictions)
    if is_rank_zero():
        write_json(folder / "metrics.json", result)
        write_text(folder / "metrics.md", metrics_markdown(result))
        write_pictures(folder, data.labels, predictions=predictions, plain=plain, refined=refined)
    return result


def _why_no_crf(options: Options, *, labelled: bool) -> str | None:
    if not options.eval.is_crf:
        return "eval.is_crf is false"
    if not labelled:
        return "the validation split has no labels"
    return crf_missing() if options.eval.crf_backend == "pydensecrf" else None


def results_folder(options: Options) -> Path:
    """The run's folder, or its subfolder `evaluation` to keep the results of a training run."""
    folder = Path(options.output_dir) / options.wandb.name
    return folder / "evaluation" if (folder / "options.json").exists() else folder


def require_ppap(options: Options, *, flag: str) -> None:
    """Raises a UserError if `flag`, which studies propagation, is used with another method or loss."""
    for key, name in (("method", options.trained_by), ("training_coeff.loss", options.training_coeff.loss)):
        if name != "ppap":
            raise UserError(f"{key} is {name}, must be ppap with {flag}")


def with_any_classes(options: Options) -> Options:
    """The options, with two classes if their number is unknown, for what depends on features alone."""
    from dataset import known_labels

    chosen = options.dataset
    unknown = chosen.n_classes is None and not chosen.class_names and known_labels(chosen) is None
    return with_changes(options, {"dataset.n_classes": 2}) if unknown else options


def study_sets(options: Options, arguments: Namespace) -> Any:
    """--measure-sets compares the propagated sets with the labels; --explain plots those of one anchor."""
    from dataset import build_data
    from model import build_module
    from model.explain import explain_image
    from model.set_quality import measure_sets
    from utils.plots.tables import explanation_table, sets_table

    flag = "--measure-sets" if arguments.measure_sets else "--explain"
    require_ppap(options, flag=flag)
    options = options if arguments.measure_sets else with_any_classes(options)
    data, folder = build_data(options, train=False), results_folder(options)
    module = build_module(options, data.labels)
    if arguments.measure_sets:
        result = measure_sets(module, data, folder=folder)
        table = sets_table(result)
    else:
        folder, anchor = folder / "explain", {"image": arguments.explain, "patch": arguments.patch}
        result = explain_image(module, data, folder=folder, **anchor)
        table = explanation_table(result)
    print(f"\n{table}\n\nresults: {folder}")
    return result


def write_explorer(options: Options, arguments: Namespace) -> Path:
    """--explore: writes a page on which any patch can be the anchor."""
    from dataset import build_data, known_labels
    from model import build_module, load_segmenter
    from model.explore import explore
    from utils.training.device import device_name

    if (loss := options.training_coeff.loss) != "ppap":
        raise UserError(f"training_coeff.loss is {loss}, must be ppap with --explore")
    page, predictor = Path(arguments.out), None
    indexed = arguments.explore.isdecimal()
    data = build_data(with_any_classes(options), train=False) if indexed else None
    labels = known_labels(options.dataset)
    if arguments.checkpoint:
        how = {"opt": options, "labels": labels, "device": device_name(options)}
        predictor = load_segmenter(options.checkpoint, **how)
    module = predictor.module if predictor else build_module(options, labels or NO_CLASSES)
    explore(module, data, arguments.explore, page=page, labels=labels, predictor=predictor)
    return page


def write_masks(options: Options, arguments: Namespace) -> dict[str, Any]:
    """--images: writes masks of one photograph or of a folder."""
    from dataset import known_labels
    from model import load_segmenter
    from model.predictor import predict_folder
    from utils.training.device import device_name

    labels, device = known_labels(options.dataset), device_name(options)
    flags = {name: getattr(arguments, name) for name in ("res", "crf", "tile")}
    flags |= {"head": arguments.head or "cluster", "device": device}
    predictor = load_segmenter(options.checkpoint, opt=options, labels=labels, **flags)
    images, out = Path(arguments.images), Path(arguments.out)
    return predict_folder(predictor, images, out, names=arguments.names, flat=arguments.flat)


def export_checkpoint(options: Options, path: Path) -> None:
    """--export: writes a checkpoint in the published format."""
    from model.checkpoint import export, open_checkpoint

    found = open_checkpoint(options.checkpoint, options.output_dir)
    export(found, path)
    print(f"{found.path} written in the published format: {path}")


def _stored_options(arguments: Namespace) -> tuple[dict[str, Any], str]:
    """The flat options in --checkpoint, and its file.

    By default, results are written to the folder of its run, if there is one.
    """
    from model.checkpoint import open_checkpoint, stored_options

    choices, _ = parse_overrides(arguments.overrides)
    (output_dir,) = choices.get("output_dir", [Options().output_dir])
    found = open_checkpoint(arguments.checkpoint, output_dir)
    path = found.path.absolute()
    folder, flat = path.parent, stored_options(found)
    if (folder / "options.json").exists():
        flat |= {"output_dir": str(folder.parent), "wandb.name": folder.name}
    return flat, str(path)


def main(argv: Sequence[str] | None = None) -> list[Any]:
    """Runs the command that the flags choose, once per job."""
    arguments = parse_arguments(argv, description="Evaluate a checkpoint.", examples=EXAMPLES, training=False)
    stored = {}
    if not (arguments.opt or arguments.export):  # an export needs no options
        stored, file = _stored_options(arguments)  # a name would be looked up in another `output_dir` below
        arguments = Namespace(**vars(arguments) | {"checkpoint": file})
    jobs = plan_jobs(arguments, stored)
    if arguments.print_options:
        return print_options(jobs)
    if arguments.export:
        return [export_checkpoint(jobs[0].options, Path(arguments.export))]
    if arguments.measure_sets or arguments.explain is not None:
        return [study_sets(job.options, arguments) for job in jobs]
    if arguments.explore is not None:
        return [write_explorer(job.options, arguments) for job in jobs]
    if arguments.images is not None:
        return [write_masks(job.options, arguments) for job in jobs]
    from utils.plots.tables import class_table, metrics_table, sweep_table

    results = []
    for job in jobs:
        folder = results_folder(job.options)
        results.append(evaluate(job.options, checkpoint=job.options.checkpoint, folder=folder))
        tables = [class_table(results[-1]), metrics_table({job.options.wandb.name: results[-1]})]
        print("\n" + "\n\n".join([*tables[len(jobs) > 1 :], f"results: {folder}"]))
    if len(jobs) > 1:
        print("\n" + sweep_table([(job.setting, result) for job, result in zip(jobs, results, strict=True)]))
    return results


if __name__ == "__main__":
    sys.exit(guarded(main, then="repeat the command"))
