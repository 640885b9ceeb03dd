"""Downloads a published data set, checks it and prints the next command.

    python dataset/dataset_download.py cocostuff --root <folder>

The same command resumes an interrupted download; rerunning it on a complete data set is a no-op.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

if not __package__:  # run as a file: modules are found from the project's root, not from dataset/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import requests

from dataset import DATA_SETS
from utils.config.cli import guarded
from utils.config.options import DatasetOptions
from utils.download import DownloadError, connection_error, download, extract, readable_size
from utils.errors import UserError
from utils.files import exclusive, make_folder

COCO = ("http://images.cocodataset.org/zips", "https://s3.amazonaws.com/images.cocodataset.org/zips")
CALVIN = ("http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset",)
STEGO = ("https://marhamilresearch4.blob.core.windows.net/stego-public/pytorch_data",)
PICIE = (  # its repository contains IIC's curated lists
    "https://raw.githubusercontent.com/janghyuncho/PiCIE/fc4e7c193c2ba77a6dbf9f24e5e7cf99da9f528a",
    "https://cdn.jsdelivr.net/gh/janghyuncho/PiCIE@fc4e7c193c2ba77a6dbf9f24e5e7cf99da9f528a",
)
COCO_LISTS = (
    "curated/train2017/Coco164kFull_Stuff_Coarse.txt",
    "curated/train2017/Coco164kFull_Stuff_Coarse_7.txt",
    "curated/train2017/Coco164kFew_Stuff_6.txt",
    "curated/val2017/Coco164kFull_Stuff_Coarse_7.txt",
    "curated/val2017/Coco164kFew_Stuff_6.txt",
)
COCO_FOLDERS = tuple(
    f"{part}/{split}" for part in ("curated", "images", "annotations") for split in ("train2017", "val2017")
)


@dataclass(frozen=True)
class File:
    """A file to download.

    Attributes:
        name: path below the root and below each address.
        bases: addresses without the name, tried in this order; none if downloading needs an account.
        size: bytes; exact if `sha256` is known, otherwise an estimate.
        sha256: digest, if published.
        wanted: folders and files to unpack from a zip archive; empty for a plain file.
        into: folder below the root that they are unpacked into.
    """

    name: str
    bases: tuple[str, ...]
    size: int
    sha256: str | None = None
    wanted: tuple[str, ...] = ()
    into: str = "."

    def urls(self, mirror: str) -> list[str]:
        """Full addresses, the mirror's first."""
        return [f"{base.rstrip('/')}/{quote(self.name)}" for base in (mirror, *self.bases) if base]

    def is_done(self, root: Path) -> bool:
        """Whether the file, or everything to unpack from it, exists."""
        results = [root / self.into / name for name in self.wanted] or [root / self.name]
        return all(path.exists() for path in results)


@dataclass(frozen=True)
class Target:
    """A data set to download.

    Attributes:
        data_types: the values of `dataset.data_type` that read it.
        plans: ways to get it, the preferred one first; each needs all of its files.
        commands: what to run next, without --data_path.
        account: what to do if the files need an account; {root} is the folder.
    """

    data_types: tuple[str, ...]
    plans: tuple[tuple[File, ...], ...]
    commands: tuple[str, ...]
    account: str = ""


def _coco(split: str, size: int, sha256: str) -> File:
    return File(f"{split}.zip", COCO, size, sha256, wanted=(split,), into="images")


# The exact sizes and SHA-256 are those in torchvision's prototype data sets. The size of the labels is from
# COCO-Stuff's page, those of STEGO's archives are estimated from the number of pixels.
COCOSTUFF = (
    *(File(name, PICIE, 700_000) for name in COCO_LISTS),  # small files first: a dead address shows early
    File(
        "stuffthingmaps_trainval2017.zip",
        CALVIN,
        659_000_000,
        wanted=("train2017", "val2017"),
        into="annotations",
    ),
    _coco("val2017", 815_585_330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
    _coco("train2017", 19_336_861_798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
)
CITYSCAPES = (
    File("gtFine_trainvaltest.zip", (), 253_000_000, wanted=("gtFine",)),
    File("leftImg8bit_trainvaltest.zip", (), 11_600_000_000, wanted=("leftImg8bit",)),
)
POTSDAM = ("labelled_train.txt", "labelled_test.txt", "imgs", "gt")
POTSDAMRAW = ("processed/imgs", "processed/gt")
CITYSCAPES_ACCOUNT = """\
Cityscapes needs an account (https://www.cityscapes-dataset.com/register/). Download the two archives in a
browser, or with csDownload, which asks for name and password (-r resumes):
  python -m pip install cityscapesscripts
  csDownload -d {root} leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip
Then run the same command again; it unpacks and checks them."""
TARGETS = {
    "cocostuff": Target(
        ("cocostuff27", "cocostuff15", "cocostuff3"),
        (COCOSTUFF, (File("cocostuff.zip", STEGO, 21_000_000_000, wanted=COCO_FOLDERS),)),
        ("python dataset/crop_datasets.py --opt cocostuff.json", "python run.py --opt cocostuff.json"),
    ),
    "cityscapes": Target(
        ("cityscapes",),
        (CITYSCAPES,),
        (
            "python dataset/crop_datasets.py --opt cityscapes_base.json",
            "python run.py --opt cityscapes_base.json",
        ),
        CITYSCAPES_ACCOUNT,
    ),
    "potsdam": Target(
        ("potsdam",),
        ((File("potsdam.zip", STEGO, 1_100_000_000, wanted=POTSDAM),),),
        ("python run.py --opt potsdam.json",),
    ),
    "potsdamraw": Target(
        ("potsdamraw",),
        ((File("potsdamraw.zip", STEGO, 1_800_000_000, wanted=POTSDAMRAW),),),
        ("python run.py --opt potsdam.json dataset.data_type=potsdamraw",),
    ),
}


def parse_arguments(
    argv: Sequence[str] | None, *, targets: Mapping[str, Target] = TARGETS
) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="Download a data set, check it, print the next command.")
    parser.add_argument("target", choices=list(targets), help="the data set")
    parser.add_argument("--root", required=True, help="its folder: the later --data_path")
    parser.add_argument("--mirror", default="", metavar="URL", help="address that is tried first")
    parser.add_argument("--keep-archives", action="store_true", help="keep archives after unpacking")
    parser.add_argument("--dry-run", action="store_true", help="print addresses and sizes, write nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, *, targets: Mapping[str, Target] = TARGETS) -> None:
    """Runs the command line.

    Raises:
        UserError: no address answers, an archive is damaged, or the data set is incomplete afterwards.
    """
    arguments = parse_arguments(argv, targets=targets)
    target, root = targets[arguments.target], Path(arguments.root)
    if arguments.mirror and not arguments.mirror.startswith(("http://", "https://")):
        raise UserError(f"--mirror is {arguments.mirror}, must begin with http:// or https://")
    try:
        lines = check(target, root)
    except UserError:
        if arguments.dry_run:
            print("\n".join(describe(target, root, mirror=arguments.mirror)))
            return
        lines = obtain(target, root, mirror=arguments.mirror, keep=arguments.keep_archives)
    commands = [f"  {command} --data_path {shlex.quote(str(root))}" for command in target.commands]
    print("\n".join([f"{root}: {arguments.target} is complete", *lines, "next:", *commands]))


def check(target: Target, root: Path) -> list[str]:
    """Opens every split of the data set; returns a line with the number of images of each.

    Raises:
        UserError: something is missing.
    """
    lines = []
    for data_type in target.data_types:
        options = DatasetOptions(data_type=data_type, data_path=str(root))
        for split in ("train", "val"):
            source = DATA_SETS[data_type].source(options, split)
            lines.append(f"  {data_type}, {split}: {len(source):,} images")
    return lines


def obtain(target: Target, root: Path, *, mirror: str, keep: bool) -> list[str]:
    """Downloads and unpacks what is missing, by the first plan that works; returns the lines of `check`.

    Raises:
        UserError: no plan works, an archive is damaged, or the data set is incomplete afterwards.
    """
    make_folder(root, named_by="--root")
    reasons: list[str] = []
    with exclusive(root / "download"):
        for plan in _in_order(target, root):
            try:
                for file in plan:
                    _obtain_file(file, root, mirror=mirror, keep=keep)
                break
            except DownloadError as error:
                print(error, flush=True)
                reasons += error.mistakes
        else:
            names = " or ".join(", ".join(file.name for file in plan) for plan in target.plans)
            hint = f"run the same command again to resume, or put into {root} by hand: {names}"
            account = target.account.format(root=shlex.quote(str(root)))
            raise DownloadError([*reasons, account or hint], "downloading")
    try:
        return check(target, root)
    except UserError as error:
        hint = "delete the folder or list that is incomplete and run the same command again"
        raise UserError([*error.mistakes, hint], f"the downloaded {root}") from None


def _in_order(target: Target, root: Path) -> list[tuple[File, ...]]:
    """The plans; one whose files were put into the folder by hand comes first."""
    return sorted(target.plans, key=lambda plan: not all((root / file.name).is_file() for file in plan))


def _obtain_file(file: File, root: Path, *, mirror: str, keep: bool) -> None:
    path = root / file.name
    if file.is_done(root):
        return
    if not path.is_file():
        if not file.urls(mirror):
            raise DownloadError(f"{path}: is missing and cannot be downloaded without an account")
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"{file.name}: about {readable_size(file.size)} from {file.urls(mirror)[0]}", flush=True)
        exact = file.size if file.sha256 else None
        download(file.urls(mirror), path, sha256=file.sha256, size=exact)
    if file.wanted:
        extract(path, root / file.into, file.wanted)
        if not keep:
            path.unlink()


def describe(target: Target, root: Path, *, mirror: str) -> list[str]:
    """What `obtain` would do: files, sizes, and which addresses answer. Writes nothing."""
    lines = []
    for number, plan in enumerate(_in_order(target, root)):
        lines.append("would download:" if number == 0 else "only if that fails:")
        for file in plan:
            done = "exists" if file.is_done(root) else f"about {readable_size(file.size)}"
            lines.append(f"  {file.name}: {done}")
            lines += [f"    {url}: {_answer(url)}" for url in file.urls(mirror) if not file.is_done(root)]
    return [*lines, target.account.format(root=shlex.quote(str(root)))]


def _answer(url: str) -> str:
    try:
        answer = requests.head(url, timeout=10, allow_redirects=True)
    except requests.RequestException as error:
        return f"no answer ({connection_error(error)})"
    size = answer.headers.get("Content-Length")
    return f"HTTP {answer.status_code}" + (f", {readable_size(int(size))}" if answer.ok and size else "")


if __name__ == "__main__":
    sys.exit(guarded(main, then="run the same command again"))
