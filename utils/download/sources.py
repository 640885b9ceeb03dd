"""Where the published data sets lie: which files, at which addresses, how large, and what they unpack to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.download import layout

COCO = ("http://images.cocodataset.org/zips", "https://s3.amazonaws.com/images.cocodataset.org/zips")
CALVIN = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset"
# IIC's curated lists, as PiCIE's repository has held them since this commit (IIC's own address is a tar.gz at
# www.robots.ox.ac.uk/~xuji/datasets). That the repository holds them was looked up; that the two addresses
# answer was not tried.
PICIE_COMMIT = "fc4e7c193c2ba77a6dbf9f24e5e7cf99da9f528a"
LISTS = (
    f"https://raw.githubusercontent.com/janghyuncho/PiCIE/{PICIE_COMMIT}",
    f"https://cdn.jsdelivr.net/gh/janghyuncho/PiCIE@{PICIE_COMMIT}",
)
STEGO = "https://marhamilresearch4.blob.core.windows.net/stego-public/pytorch_data"
ZIP_BEGINS, LIST_BEGINS = b"PK", b"0"  # a COCO id has twelve digits, the first ones zeros


@dataclass(frozen=True)
class File:
    """A file to fetch.

    Attributes:
        name: its place below the root, and below a mirror's address.
        addresses: tried in this order; none where only a person with an account can fetch it.
        size: bytes; an estimate unless `sha256` is known.
        sha256: of its content, where it is known.
        begins: its first bytes; a page that says "log in" does not have them.
    """

    name: str
    addresses: tuple[str, ...]
    size: int
    sha256: str | None = None
    begins: bytes = LIST_BEGINS


@dataclass(frozen=True)
class Archive(File):
    """A zip archive.

    Attributes:
        into: the folder below the root that it is unpacked into.
        wanted: folders and files taken from it, at its top or one folder down; all else is left in it.
    """

    begins: bytes = ZIP_BEGINS
    into: str = "."
    wanted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A data set.

    Attributes:
        plans: ways to come by it, in the order of preference; all files of one are needed.
        check: says what the folder holds and lacks.
        commands: what to run next; {root} is the folder.
        instructions: what a person has to do first; {root} is the folder. '' where nothing has to be done.
    """

    plans: tuple[tuple[File, ...], ...]
    check: Callable[[Path], layout.Finding]
    commands: tuple[str, ...]
    instructions: str = ""


def _list(name: str) -> File:
    return File(name, tuple(f"{base}/{name}" for base in LISTS), size=700_000)


def _coco(split: str, size: int, sha256: str) -> Archive:
    addresses = tuple(f"{base}/{split}.zip" for base in COCO)
    return Archive(f"{split}.zip", addresses, size, sha256, into="images", wanted=(split,))


def _stego(name: str, size: int, wanted: tuple[str, ...]) -> Archive:
    return Archive(f"{name}.zip", (f"{STEGO}/{name}.zip",), size, wanted=wanted)


# Sizes and SHA-256 of the two COCO archives are those that public projects pin, torchvision's prototypes
# among them; the size of the labels is the rounded one of COCO-Stuff's page. For STEGO's archives neither is
# published: their sizes are estimates from the pixels in them, and whether the addresses still answer was not
# tried.
COCOSTUFF = (
    *(_list(name) for name in layout.COCO_LISTS),  # small first: an address that is gone shows at once
    Archive(
        "stuffthingmaps_trainval2017.zip",
        (f"{CALVIN}/stuffthingmaps_trainval2017.zip",),
        659_000_000,
        into="annotations",
        wanted=("train2017", "val2017"),
    ),
    _coco("val2017", 815_585_330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
    _coco("train2017", 19_336_861_798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
)
CITYSCAPES = (
    Archive("gtFine_trainvaltest.zip", (), 253_000_000, wanted=("gtFine",)),
    Archive("leftImg8bit_trainvaltest.zip", (), 11_600_000_000, wanted=("leftImg8bit",)),
)
CITYSCAPES_BY_HAND = """\
Cityscapes is given to people who have an account (https://www.cityscapes-dataset.com/register/), so nothing
is downloaded here. Fetch leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip (241 MB) in a
browser, or with cityscapesscripts' csDownload, which asks for name and password (and resumes with -r):
  python -m pip install cityscapesscripts
  csDownload -d {root} leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip
then run this command again: it unpacks them and checks the result."""
TARGETS = {
    "cocostuff": Target(
        (COCOSTUFF, (_stego("cocostuff", 21_000_000_000, ("curated", "images", "annotations")),)),
        layout.check_cocostuff,
        (
            "python dataset/crop_datasets.py --opt cocostuff.json --data_path {root}",
            "python run.py --opt cocostuff.json --data_path {root}",
        ),
    ),
    "cityscapes": Target(
        (CITYSCAPES,),
        layout.check_cityscapes,
        (
            "python dataset/crop_datasets.py --opt cityscapes_base.json --data_path {root}",
            "python run.py --opt cityscapes_base.json --data_path {root}",
        ),
        CITYSCAPES_BY_HAND,
    ),
    "potsdam": Target(
        ((_stego("potsdam", 1_100_000_000, ("labelled_train.txt", "labelled_test.txt", "imgs", "gt")),),),
        layout.check_potsdam,
        ("python run.py --opt potsdam.json --data_path {root}",),
    ),
    "potsdamraw": Target(
        ((_stego("potsdamraw", 1_800_000_000, ("processed",)),),),
        layout.check_potsdamraw,
        ("python run.py --opt potsdam.json --data_path {root} dataset.data_type=potsdamraw",),
    ),
}
