"""Writes the five crops of each train image to files: python dataset/crop_datasets.py --opt cocostuff.json

Training cuts the same crops on the fly; reading prepared ones decodes a quarter of the pixels. Crop k of
image i is img/train/<5i + k>.jpg and label/train/<5i + k>.png (class + 1, 0 = ignore), as published.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:  # run as a file: modules are found from the project's root, not from dataset/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from PIL import Image

from dataset import DATA_SETS
from dataset.base import Source, classes_of
from dataset.crops import CROPS, crop_boxes, prepared_folder
from dataset.verify import in_workers
from utils.config.cli import guarded, plan_jobs
from utils.config.options import WITHOUT_FOLDER, DatasetOptions, Options
from utils.errors import UserError, exit_on_signals, listed
from utils.files import exclusive, make_folder, replacing
from utils.training.launch import cores
from utils.vision.labels import IGNORE

EPILOG = """\
examples:
  python dataset/crop_datasets.py --opt cocostuff.json --data_path <cocostuff> --dry-run
  python dataset/crop_datasets.py --opt cityscapes_base.json --data_path <cityscapes>
  python dataset/crop_datasets.py --opt cocostuff.json --data_path <cocostuff> dataset.crop_type=random

dataset/README.md describes the crops, json/README.md all options."""


def crop_files(folder: Path, number: int, *, labelled: bool) -> list[Path]:
    """The files of a crop; the label comes first, so that an image never lacks its label."""
    image, label = folder / f"img/train/{number}.jpg", folder / f"label/train/{number}.png"
    return [label, image] if labelled else [image]


def write_crops(source: Source, folder: Path, options: DatasetOptions, index: int) -> str:
    """Writes the crops of an image; returns an error message if it is damaged, otherwise ""."""
    try:
        item = source.read(index)
        classes = classes_of(item, source, index)  # (H, W)
    except UserError as error:
        return str(error)
    label = Image.fromarray(np.where(classes == IGNORE, 0, classes + 1).astype(np.uint8))
    for k, box in enumerate(crop_boxes(item.image.size, options.crop_ratio, options.crop_type, index)):
        for path in crop_files(folder, CROPS * index + k, labelled=source.labelled):
            whole, kind = (label, "PNG") if path.suffix == ".png" else (item.image, "JPEG")
            try:
                with replacing(path) as temporary:
                    whole.crop(box).save(temporary, kind)
            except OSError as error:  # torch rebuilds a worker's error from its text alone
                why = f"cannot be written ({error.strerror or error})"
                raise UserError(f"{path}: {why}; fix this, then run the same command again") from None
    return ""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; the remaining arguments are in `overrides`."""
    about = {"description": "Write the five crops of each train image to files.", "epilog": EPILOG}
    parser = argparse.ArgumentParser(**about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opt", required=True, help="option file: a path, or a name in json/ or below")
    data = {"dest": "dataset.data_path", "metavar": "DIR", "type": os.path.expanduser}
    parser.add_argument("--data_path", "--data-path", **data, help="folder of the data set")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; default: one per core")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, write nothing")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.set_defaults(test=False, checkpoint=None)  # flags of run.py
    return parser.parse_intermixed_args(argv)


def chosen_options(arguments: argparse.Namespace) -> Options:
    """The options of a training run with the same arguments."""
    jobs = plan_jobs(arguments)
    if len(jobs) > 1:
        raise UserError(f"the overrides describe a sweep of {len(jobs)} runs; give each key one value")
    return jobs[0].options


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    arguments = parse_arguments(argv)
    options = chosen_options(arguments).dataset
    name, kind = options.data_type, DATA_SETS[options.data_type]
    if name in WITHOUT_FOLDER or not kind.cropped or options.crop_type is None:
        chosen = f"dataset.data_type is {name} and dataset.crop_type {options.crop_type}"
        raise UserError(f"{chosen}: training uses whole images, so there are no crops to prepare")
    source = kind.source(options, "train")
    folder = prepared_folder(Path(options.data_path), name, options.crop_type, options.crop_ratio)
    existing, numbers, labelled = set(folder.glob("*/train/*")), range(CROPS * len(source)), source.labelled
    missing = [n for n in numbers if not existing.issuperset(crop_files(folder, n, labelled=labelled))]
    todo = sorted({number // CROPS for number in missing})
    done = f"{len(source) - len(todo)} of {len(source)} images have all their crops"
    print(f"{folder}: {done}; {CROPS * len(todo)} crops to write", flush=True)
    if arguments.dry_run:
        return
    for part in ("img", "label") if labelled else ("img",):
        make_folder(folder / part / "train", named_by="dataset.data_path")
    with exclusive(folder, advice=""):
        task = partial(write_crops, source, folder, options)
        messages = in_workers(task, todo, workers=arguments.workers, desc="crops", unit="image")
    if damaged := [message for message in messages if message]:
        message = listed(f"{len(damaged)} of {len(source)} images are damaged and have no crops", damaged)
        if not options.skip_damaged:
            hint = "fix or remove them and run the same command again, or set dataset.skip_damaged=true"
            raise UserError(f"{message}\n{hint}")
        print(message)
    print(f"the crops of {len(source) - len(damaged)} images are in {folder}")


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(guarded(main, then="run the same command again"))
