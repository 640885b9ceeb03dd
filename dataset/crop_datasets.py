"""Writes the five crops of each train image to files: python dataset/crop_datasets.py --opt cocostuff.json

Training cuts the same crops on the fly; with prepared ones it decodes a quarter of the pixels. They go where
the published code keeps them, <data_path>/cropped/<data_type>_<crop_type>_crop_<crop_ratio>/, as JPEG with
Pillow's default quality, and their labels as PNG of class + 1, 0 = ignore. Crop k of image i has the number
5 * i + k.

A run that is cut short leaves a folder that training refuses; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: what is imported below lies in the project's root, not in dataset/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from utils.config.cli import guarded, parse_overrides
from utils.config.loading import find_option_file, load_options, missing_files
from utils.config.options import WITHOUT_FOLDER, Options
from utils.errors import Interrupted, UserError, listed

if TYPE_CHECKING:
    from dataset.crop_files import CropPlan

# What needs torch is imported inside functions: a mistyped option is answered at once.


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; further words are left in `overrides`."""
    parser = argparse.ArgumentParser(description="Write the five crops of each train image to files.")
    parser.add_argument("--opt", required=True, help="option file: a path, or a name in json/, json/server/")
    parser.add_argument("--data_path", help="folder of the data set")
    parser.add_argument("--workers", type=int, help="number of processes; by default one a core")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    what.add_argument("--check", action="store_true", help="hold a finished folder against the data set")
    parser.add_argument("overrides", nargs="*", help="key=value")
    return parser.parse_intermixed_args(argv)


def chosen_options(arguments: argparse.Namespace) -> Options:
    """The options that a run with the same words would have.

    Raises:
        UserError: a mistake in them, or no crops are prepared with them.
    """
    path = find_option_file(arguments.opt)
    overrides = parse_overrides(arguments.overrides)
    mistakes = list(overrides.mistakes)
    mistakes += [
        f"{key} is given {len(values)} values; crops are prepared for one: name one"
        for key, values in overrides.choices.items()
        if len(values) > 1
    ]
    if arguments.workers is not None and arguments.workers < 1:
        mistakes.append(f"--workers is {arguments.workers}, must be at least 1")
    given = {} if arguments.data_path is None else {"dataset.data_path": arguments.data_path}
    try:
        options = load_options(path, given | {key: values[0] for key, values in overrides.choices.items()})
        mistakes += [line for line in missing_files(options) if line.startswith("dataset.")]
    except UserError as error:
        mistakes += error.mistakes
    if mistakes:
        raise UserError(mistakes, f"{path} and the command line")
    return options


def plan_crops(options: Options) -> CropPlan:
    """What is to be prepared for a run.

    Raises:
        UserError: nothing is, or the data set is not where the options say.
    """
    from dataset import DATA_SETS
    from dataset.crop_files import CropPlan

    chosen = options.dataset
    kind = DATA_SETS[chosen.data_type]
    names = (name for name, each in DATA_SETS.items() if each.cropped and name not in WITHOUT_FOLDER)
    kept = ", ".join(names)
    if chosen.data_type in WITHOUT_FOLDER:
        raise UserError(
            f"dataset.data_type is {chosen.data_type}: its images are made on the fly, nothing is to be "
            f"prepared; crops are those of {kept}"
        )
    if not kind.cropped:
        raise UserError(
            f"dataset.data_type is {chosen.data_type}: it trains on whole images whatever dataset.crop_type "
            f"says, nothing is to be prepared; crops are those of {kept}"
        )
    if chosen.crop_type is None:
        raise UserError(
            "dataset.crop_type is null: training takes whole images, nothing is to be prepared; set "
            "dataset.crop_type=five or random, there and here"
        )
    return CropPlan.of(kind.source(chosen, "train"), chosen)


def prepare(plan: CropPlan, *, workers: int, dry_run: bool = False, skip_damaged: bool = False) -> None:
    """Writes the crops that are not there yet.

    Args:
        plan: of the crops.
        workers: number of processes.
        dry_run: only say what would be done.
        skip_damaged: call the folder complete without the crops of damaged images.

    Raises:
        UserError: the folder holds other crops, cannot be written or has no room; or, after all others are
            done, images are damaged.
    """
    from dataset.crop_files import read_own_record, unfinished, write_crops, write_record
    from dataset.crops import CROPS
    from dataset.processes import map_images

    record, todo = read_own_record(plan), unfinished(plan)
    images = len(plan.source)
    there, lacking = CROPS * (images - len(todo)), CROPS * len(todo)
    print(f"{plan.folder}: {there} crops of {images} images are there, {lacking} are to be written")
    check_space(plan, todo)
    if dry_run:
        return
    if record is not None and record.get("complete") and not todo:
        print("all there: nothing to do")
        return
    write_record(plan, complete=False, missing=[])
    results = map_images(write_crops, plan, indices=todo, workers=workers, title="crops")
    damaged = {index: line for index, line in zip(todo, results, strict=True) if line is not None}
    if damaged:
        head, lines = f"{len(damaged)} of {images} images without crops", list(damaged.values())
        if not skip_damaged:
            mend = "mend these, then the same command goes on; or leave them out, dataset.skip_damaged=true"
            raise UserError(listed(f"{head}; {mend}", lines))
        print(listed(head, lines))
    write_record(plan, complete=True, missing=list(damaged))
    print(f"{CROPS * (images - len(damaged))} crops are in {plan.folder}")


def check_space(plan: CropPlan, todo: list[int]) -> None:
    """Says how much disk space the crops will take.

    Raises:
        UserError: more than is free.
    """
    from dataset.crop_files import expected_bytes

    there = next(place for place in (plan.folder, *plan.folder.parents) if place.exists())
    needed, free = expected_bytes(plan, todo), shutil.disk_usage(there).free
    print(f"disk space: about {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free")
    if needed > free:
        raise UserError(
            f"{plan.folder}: about {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free; make "
            "room, or let cropped/ be a link to a larger disk"
        )


def check(plan: CropPlan, *, workers: int) -> None:
    """Holds a finished folder against the data set.

    Raises:
        UserError: a file is missing, damaged, wrong or too many, or the folder is not finished.
    """
    from dataset.crop_files import check_crops, read_record, stored_files
    from dataset.processes import map_images

    record = read_record(plan)
    if record is not None and not record.get("complete"):
        raise UserError(f"{plan.folder}: not complete; the same command without --check goes on with it")
    lacking = set(record.get("missing", [])) if record else set()
    indices = [index for index in range(len(plan.source)) if index not in lacking]
    found = map_images(check_crops, plan, indices=indices, workers=workers, title="check")
    problems = [line for lines in found for line in lines]
    expected = {name for index in indices for name in plan.names(index)}
    problems += [
        f"{plan.folder / name}: no crop has this name" for name in stored_files(plan) if name not in expected
    ]
    if problems:
        mend = "remove those that are wrong, then the same command without --check writes them anew"
        raise UserError(listed(f"{plan.folder}: wrong in {len(problems)} places; {mend}", problems))
    source = "" if record else " (no record: not made here)"
    print(f"{len(expected)} files in {plan.folder} are as they should be{source}")


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line asks for."""
    arguments = parse_arguments(argv)
    options = chosen_options(arguments)
    try:
        from utils.training.launch import cores

        plan, workers = plan_crops(options), arguments.workers or cores()
        if arguments.check:
            check(plan, workers=workers)
        else:
            skip = options.dataset.skip_damaged
            prepare(plan, workers=workers, dry_run=arguments.dry_run, skip_damaged=skip)
    except KeyboardInterrupt:
        writing = not (arguments.check or arguments.dry_run)
        stays = "what is written stays, the same command goes on from there"
        raise Interrupted(stays if writing else "nothing was changed") from None


if __name__ == "__main__":
    sys.exit(guarded(main, then="give the same command again"))
