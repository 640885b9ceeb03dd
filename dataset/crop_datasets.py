"""Writes the five crops of each train image to files: python dataset/crop_datasets.py --opt cocostuff.json

Training cuts the same crops on the fly; reading prepared ones decodes a quarter of the pixels. They go to
the published layout, <data_path>/cropped/<data_type>_<crop_type>_crop_<crop_ratio>/: img/train/<n>.jpg with
Pillow's default quality and label/train/<n>.png with class + 1, 0 = ignore; crop k of image i is n = 5i + k.

Existing files are skipped, so the same command resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run as a file: modules are found from the project's root, not from dataset/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset import DATA_SETS
from dataset.base import Source, classes_of
from dataset.crops import CROPS, crop_boxes, prepared_folder
from utils.config.cli import guarded, parse_overrides
from utils.config.loading import find_option_file, load_options
from utils.config.options import WITHOUT_FOLDER, DatasetOptions, Options
from utils.errors import UserError, listed
from utils.files import exclusive, make_folder, replacing
from utils.training.launch import cores
from utils.vision.labels import IGNORE


class CropWriter(Dataset):
    """Writes the crops of one image; an item is what is wrong with the image, "" if nothing is.

    Being a data set, it runs in the worker processes of a DataLoader.

    Args:
        source: whole images of the train split.
        options: `dataset.*`.

    Attributes:
        folder: of the crops.
        todo: images of which a file is missing.
    """

    def __init__(self, source: Source, options: DatasetOptions) -> None:
        self.source, self.kind, self.ratio = source, options.crop_type, options.crop_ratio
        self.folder = folder_of(options)
        existing = {path for path in self.folder.glob("*/train/*") if path.stat().st_size}
        self.todo = [
            index
            for index in range(len(source))
            if not existing.issuperset(path for k in range(CROPS) for path in self._paths(CROPS * index + k))
        ]

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, item: int) -> str:
        try:
            for path, crop in self._crops(self.todo[item]):
                with replacing(path) as temporary:
                    crop.save(temporary, "PNG" if path.suffix == ".png" else "JPEG")
        except UserError as error:
            return str(error)
        except OSError as error:
            reason = f"cannot be written ({error.strerror or error})"
            raise UserError(f"{self.folder}: {reason}; free space or get access, then run again") from None
        return ""

    def progress(self) -> str:
        """How many images are done."""
        total = len(self.source)
        return f"{self.folder}: {total - len(self.todo)} of {total} images have all their crops"

    def _paths(self, number: int) -> list[Path]:
        """The files of a crop."""
        label, image = f"label/train/{number}.png", f"img/train/{number}.jpg"
        return [self.folder / name for name in ((label, image) if self.source.labelled else (image,))]

    def _crops(self, index: int) -> Iterator[tuple[Path, Image.Image]]:
        """Files and crops; the label comes first, so that an image never lacks its label."""
        raw = self.source.read(index)
        label = Image.new("L", raw.image.size)  # all ignored, for an image without a label
        if raw.label is not None:
            classes = classes_of(raw.label, self.source, index)  # (H, W)
            label = Image.fromarray(np.where(classes == IGNORE, 0, classes + 1).astype(np.uint8))
        image = Image.fromarray(np.asarray(raw.image))  # without metadata, which every crop would repeat
        for k, box in enumerate(crop_boxes(image.size, self.ratio, self.kind, index)):
            for path in self._paths(CROPS * index + k):
                yield path, (label if path.suffix == ".png" else image).crop(box)


def folder_of(options: DatasetOptions) -> Path:
    """Where the crops of a data set go."""
    return prepared_folder(Path(options.data_path), options.data_type, options.crop_type, options.crop_ratio)


def write_crops(writer: CropWriter, *, workers: int, skip_damaged: bool) -> None:
    """Writes all crops that do not exist yet.

    Raises:
        UserError: the folder cannot be written; or some images are damaged, after all others are done.
    """
    for part in ("img", "label") if writer.source.labelled else ("img",):
        make_folder(writer.folder / part / "train", named_by="dataset.data_path")
    loader = DataLoader(writer, batch_size=1, collate_fn=list, num_workers=workers)
    lines = [line for (line,) in tqdm(loader, desc="crops", unit="image") if line]
    if lines:
        message = listed(f"{len(lines)} of {len(writer.source)} images are damaged and have no crops", lines)
        if not skip_damaged:
            hint = "fix or remove them and run the same command again, or set dataset.skip_damaged=true"
            raise UserError(f"{message}\n{hint}")
        print(message)
    print(f"the crops of {len(writer.source) - len(lines)} images are in {writer.folder}")


def open_source(options: DatasetOptions) -> Source:
    """The whole train images.

    Raises:
        UserError: the options do not train on crops of files, or the data set is incomplete.
    """
    kind = DATA_SETS[options.data_type]
    if options.data_type in WITHOUT_FOLDER or not kind.cropped:
        cropped = (name for name, other in DATA_SETS.items() if other.cropped and name not in WITHOUT_FOLDER)
        raise UserError(
            f"dataset.data_type is {options.data_type}, which has no crops to prepare; those with crops are "
            f"{', '.join(cropped)}"
        )
    if options.crop_type is None:
        raise UserError("dataset.crop_type is null: training uses whole images; set it to five or random")
    return kind.source(options, "train")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; further words are in `overrides`."""
    parser = argparse.ArgumentParser(description="Write the five crops of each train image to files.")
    parser.add_argument("--opt", required=True, help="option file: a path, or a name in json/, json/server/")
    parser.add_argument("--data_path", help="folder of the data set")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; default: one per core")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, write nothing")
    parser.add_argument("overrides", nargs="*", help="key=value")
    return parser.parse_intermixed_args(argv)


def chosen_options(arguments: argparse.Namespace) -> Options:
    """The options of a run with the same arguments.

    Raises:
        UserError: a mistake in them.
    """
    overrides = parse_overrides(arguments.overrides)
    mistakes = list(overrides.mistakes)
    mistakes += [
        f"{key} has several values, must have one" for key, v in overrides.choices.items() if len(v) > 1
    ]
    if arguments.workers < 0:
        mistakes.append(f"--workers is {arguments.workers}, must be at least 0")
    if mistakes:
        raise UserError(mistakes, "the command line")
    given = {} if arguments.data_path is None else {"dataset.data_path": arguments.data_path}
    given |= {key: values[0] for key, values in overrides.choices.items()}
    return load_options(find_option_file(arguments.opt), given)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    arguments = parse_arguments(argv)
    chosen = chosen_options(arguments).dataset
    source = open_source(chosen)
    if arguments.dry_run:
        print(CropWriter(source, chosen).progress())
        return
    folder = folder_of(chosen)
    make_folder(folder.parent, named_by="dataset.data_path")
    with exclusive(folder):
        writer = CropWriter(source, chosen)
        print(writer.progress(), flush=True)
        write_crops(writer, workers=arguments.workers, skip_damaged=chosen.skip_damaged)


if __name__ == "__main__":
    sys.exit(guarded(main, then="run the same command again"))
