"""Whether a folder holds a whole data set, in the layout that the sources here read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COCO_SPLITS = ("train2017", "val2017")
COCO_LISTS = (  # those that the data sets read
    "curated/train2017/Coco164kFull_Stuff_Coarse.txt",
    "curated/train2017/Coco164kFull_Stuff_Coarse_7.txt",
    "curated/train2017/Coco164kFew_Stuff_6.txt",
    "curated/val2017/Coco164kFull_Stuff_Coarse_7.txt",
    "curated/val2017/Coco164kFew_Stuff_6.txt",
)
CITYSCAPES_COUNTS = {"train": 2975, "val": 500}


@dataclass(frozen=True)
class Finding:
    """What a folder holds.

    Attributes:
        mistakes: what it lacks, one line each; none if it is complete.
        counts: items found by split or list.
    """

    mistakes: tuple[str, ...]
    counts: dict[str, int]


def check_cocostuff(root: Path) -> Finding:
    """Every id of every curated list has an image and an annotation."""
    listed: dict[str, dict[str, None]] = {split: {} for split in COCO_SPLITS}
    mistakes, counts = [], {}
    for name in COCO_LISTS:
        ids, mistake = _read_list(root / name)
        mistakes += mistake
        counts[name] = len(ids)
        listed[name.split("/")[1]].update(dict.fromkeys(ids))
    for split, ids in listed.items():
        mistakes += _lacking(root / "images" / split, [f"{name}.jpg" for name in ids], "images")
        mistakes += _lacking(root / "annotations" / split, [f"{name}.png" for name in ids], "annotations")
    return Finding(tuple(mistakes), counts)


def check_potsdam(root: Path) -> Finding:
    """Every id of both lists has a patch and its labels."""
    mistakes, counts = [], {}
    for name in ("labelled_train.txt", "labelled_test.txt"):
        ids, mistake = _read_list(root / name, digits=False)
        counts[name] = len(ids)
        files = [f"{word}.mat" for word in ids]
        mistakes += [*mistake, *_lacking(root / "imgs", files, f"patches of {name}")]
        mistakes += _lacking(root / "gt", files, f"labels of {name}")
    return Finding(tuple(mistakes), counts)


def check_potsdamraw(root: Path) -> Finding:
    """There are patches, and each has its labels."""
    folder = root / "processed" / "imgs"
    patches = sorted(name for name in _names(folder) if name.endswith(".mat"))
    mistakes = [] if patches else [f"{folder}: holds no .mat patch"]
    mistakes += _lacking(root / "processed" / "gt", patches, "labels")
    return Finding(tuple(mistakes), {"processed/imgs": len(patches)})


def check_cityscapes(root: Path) -> Finding:
    """As many images as published in train and val, each with its fine label ids."""
    mistakes, counts = [], {}
    for split, wanted in CITYSCAPES_COUNTS.items():
        images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        counts[split] = len(images)
        if len(images) != wanted:
            folder = root / "leftImg8bit" / split
            mistakes.append(f"{folder}: holds {len(images):,} <city>/*_leftImg8bit.png, must hold {wanted:,}")
        for city in sorted({path.parent.name for path in images}):
            names = [path.name for path in images if path.parent.name == city]
            files = [name.replace("_leftImg8bit", "_gtFine_labelIds") for name in names]
            mistakes += _lacking(root / "gtFine" / split / city, files, "labels")
    return Finding(tuple(mistakes), counts)


def file_count(folder: Path) -> int:
    """How many files a folder holds itself."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.is_file() for entry in entries)
    except OSError:
        return 0


def _read_list(path: Path, *, digits: bool = True) -> tuple[list[str], list[str]]:
    """The ids of a list, and a line for what is wrong with it."""
    try:
        ids = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return [], [f"{path}: is missing or unreadable"]
    strange = [word for word in ids if digits and not (word.isdecimal() and len(word) == 12)]
    if strange or not ids:
        held = f"holds {strange[0]!r}" if strange else "is empty"
        return [], [f"{path}: {held}, must hold image ids; delete it, and it is fetched again"]
    return ids, []


def _lacking(folder: Path, files: Sequence[str], what: str) -> list[str]:
    """A line that counts the files a folder lacks and names the first, or nothing."""
    there = _names(folder)
    missing = [name for name in files if name not in there]
    if not missing:
        return []
    return [f"{folder}: lacks {len(missing):,} of {len(files):,} {what}, {missing[0]} first"]


def _names(folder: Path) -> set[str]:
    """Names in a folder, read in one go: asking for each of 120,000 files takes minutes on a network disk."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except OSError:
        return set()
