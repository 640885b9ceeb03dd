"""Downloads a published data set, checks it and prints the next command.

    python dataset/dataset_download.py cocostuff --root <folder>

The same command resumes an interrupted download; rerunning it on a complete data set is a no-op.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: modules are found from the project's root, not from dataset/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tqdm import tqdm

from dataset import DATA_SETS
from dataset.cocostuff import LISTS
from utils.config.cli import guarded
from utils.config.options import DatasetOptions
from utils.download import DownloadError, download, extract
from utils.errors import UserError, exit_on_signals
from utils.files import exclusive, make_folder

EPILOG = """\
examples:
  python dataset/dataset_download.py cocostuff --root <cocostuff> --dry-run
  python dataset/dataset_download.py potsdam --root <potsdam>
  python dataset/dataset_download.py cityscapes --root <cityscapes>

dataset/README.md shows the layout of each data set."""
COCO = ("http://images.cocodataset.org/zips", "https://s3.amazonaws.com/images.cocodataset.org/zips")
CALVIN = ("http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset",)
STEGO = ("https://marhamilresearch4.blob.core.windows.net/stego-public/pytorch_data",)
PICIE = (  # its repository contains IIC's curated lists
    "https://raw.githubusercontent.com/janghyuncho/PiCIE/fc4e7c193c2ba77a6dbf9f24e5e7cf99da9f528a",
    "https://cdn.jsdelivr.net/gh/janghyuncho/PiCIE@fc4e7c193c2ba77a6dbf9f24e5e7cf99da9f528a",
)


@dataclass(frozen=True)
class File:
    """A file to download, and what to unpack from it."""

    name: str  # path below the root and below each address
    bases: tuple[str, ...]  # addresses without the name, tried in this order; none: needs an account
    size: int  # bytes; exact if the digest is known, otherwise an estimate
    sha256: str | None = None
    wanted: tuple[str, ...] = ()  # folders and files of a zip archive; none for a plain file
    into: str = "."  # folder below the root that they are unpacked into

    def urls(self, mirror: str) -> list[str]:
        """Full addresses, the mirror's first."""
        return [f"{base.rstrip('/')}/{self.name}" for base in (mirror, *self.bases) if base]


@dataclass(frozen=True)
class Target:
    """A data set to download."""

    data_types: tuple[str, ...]  # values of `dataset.data_type` that read it
    plans: tuple[tuple[File, ...], ...]  # ways to get it, the preferred one first
    opt: str  # arguments of --opt in the next commands
    account: str = ""  # what to do if the files need an account; {root} is the folder


def _coco(split: str, size: int, sha256: str) -> File:
    return File(f"{split}.zip", COCO, size, sha256, wanted=(split,), into="images")


def _stego(name: str, size: int, *wanted: str) -> tuple[File]:
    return (File(f"{name}.zip", STEGO, size, wanted=wanted),)


# The exact sizes and SHA-256 are those in torchvision's prototype data sets. The size of the labels is from
# COCO-Stuff's page, those of STEGO's archives are estimated from the number of pixels.
SPLITS = ("train2017", "val2017")
COCO_LISTS = sorted({f"curated/{split}2017/{each[split]}" for each in LISTS.values() for split in each})
COCO_FOLDERS = [f"{part}/{split}" for part in ("curated", "images", "annotations") for split in SPLITS]
COCOSTUFF = (
    *(File(name, PICIE, 700_000) for name in COCO_LISTS),  # small files first: a dead address shows early
    File("stuffthingmaps_trainval2017.zip", CALVIN, 659_000_000, wanted=SPLITS, into="annotations"),
    _coco("val2017", 815_585_330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
    _coco("train2017", 19_336_861_798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
)
CITYSCAPES = (
    File("gtFine_trainvaltest.zip", (), 253_000_000, wanted=("gtFine",)),
    File("leftImg8bit_trainvaltest.zip", (), 11_600_000_000, wanted=("leftImg8bit",)),
)
POTSDAM = _stego("potsdam", 1_100_000_000, "labelled_train.txt", "labelled_test.txt", "imgs", "gt")
POTSDAMRAW = _stego("potsdamraw", 1_800_000_000, "processed/imgs", "processed/gt")
CITYSCAPES_ACCOUNT = """\
Cityscapes needs an account (https://www.cityscapes-dataset.com/register/). Download the two archives in a
browser, or with csDownload, which asks for name and password (-r resumes):
  python -m pip install cityscapesscripts
  csDownload -d {root} leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip
Then run the same command again; it unpacks and checks them."""
TARGETS = {
    "cocostuff": Target(
        ("cocostuff27", "cocostuff15", "cocostuff3"),
        (COCOSTUFF, _stego("cocostuff", 21_000_000_000, *COCO_FOLDERS)),
        "cocostuff.json",
    ),
    "cityscapes": Target(("cityscapes",), (CITYSCAPES,), "cityscapes_base.json", CITYSCAPES_ACCOUNT),
    "potsdam": Target(("potsdam",), (POTSDAM,), "potsdam.json"),
    "potsdamraw": Target(("potsdamraw",), (POTSDAMRAW,), "potsdam.json dataset.data_type=potsdamraw"),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    about = {"description": "Download a data set, check it, print the next command.", "epilog": EPILOG}
    parser = argparse.ArgumentParser(**about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(TARGETS), help="the data set")
    root = {"required": True, "type": os.path.expanduser}
    parser.add_argument("--root", **root, help="its folder: the later --data_path")
    parser.add_argument("--mirror", default="", metavar="URL", help="URL to try first")
    parser.add_argument("--keep-archives", action="store_true", help="keep archives after unpacking")
    parser.add_argument("--dry-run", action="store_true", help="print addresses and sizes, write nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, *, targets: Mapping[str, Target] = TARGETS) -> None:
    """Runs the command line."""
    arguments = parse_arguments(argv)
    target, root = targets[arguments.target], Path(arguments.root)
    if arguments.dry_run:
        for plan in target.plans:
            print("would download:" if plan is target.plans[0] else "only if that fails:")
            for file in plan:
                print(f"  {file.name}: about {tqdm.format_sizeof(file.size, 'B')}")
                print("".join(f"    {url}\n" for url in file.urls(arguments.mirror)), end="")
        print(target.account.format(root=shlex.quote(str(root))))
        return
    _obtain(target, root, mirror=arguments.mirror, keep=arguments.keep_archives)
    lines = [f"{root}: {arguments.target} is complete"]
    try:
        for data_type in target.data_types:
            options = DatasetOptions(data_type=data_type, data_path=str(root))
            for split in ("train", "val"):
                count = len(DATA_SETS[data_type].source(options, split))  # a missing file is an error
                lines.append(f"  {data_type}, {split}: {count:,} images")
    except UserError as error:
        hint = "delete the folder or list that is incomplete and run the same command again"
        raise UserError([*error.mistakes, hint], f"the downloaded {root}") from None
    print("\n".join([*lines, "next:"]))
    cropped = DATA_SETS[target.data_types[0]].cropped
    for program in ("dataset/crop_datasets.py", "run.py") if cropped else ("run.py",):
        print(f"  python {program} --opt {target.opt} --data_path {shlex.quote(str(root))}")


def _obtain(target: Target, root: Path, *, mirror: str, keep: bool) -> None:
    """Downloads and unpacks what is missing, by the first plan that works."""
    make_folder(root, named_by="--root")
    reasons: list[str] = []

    def is_missing(plan: tuple[File, ...]) -> bool:
        """Sort key: plans whose files are all present come first."""
        return not all((root / file.name).is_file() for file in plan)

    with exclusive(root / "download", advice=""):
        for plan in sorted(target.plans, key=is_missing):
            try:
                for file in plan:
                    _obtain_file(file, root, mirror=mirror, keep=keep)
                return
            except DownloadError as error:
                print(error, flush=True)
                reasons += error.mistakes
    names = " or ".join(", ".join(file.name for file in plan) for plan in target.plans)
    hint = f"run the same command again to resume, or put into {root} by hand: {names}"
    raise DownloadError([*reasons, target.account.format(root=shlex.quote(str(root))) or hint], "downloading")


def _obtain_file(file: File, root: Path, *, mirror: str, keep: bool) -> None:
    """Downloads a file; unpacks an archive and deletes it last, so that a stopped extraction is repeated."""
    path = root / file.name
    if not path.is_file():
        if file.wanted and all((root / file.into / name).exists() for name in file.wanted):
            return
        if not file.urls(mirror):
            raise DownloadError(f"{path}: is missing and cannot be downloaded without an account")
        path.parent.mkdir(parents=True, exist_ok=True)
        download(file.urls(mirror), path, sha256=file.sha256, size=file.size if file.sha256 else None)
    if file.wanted:
        extract(path, root / file.into, file.wanted)
        if not keep:
            path.unlink()


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(guarded(main, then="run the same command again"))
