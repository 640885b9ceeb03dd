"""The flags that eval.py alone has, and what is wrong with them."""

from __future__ import annotations

import argparse
import re

from utils.errors import UserError
from utils.plots.mask_files import read_names

BELONG = {  # flag -> the one that it is nothing without
    "--patch": "--explain",
    "--out": "--images",
    "--res": "--images",
    "--head": "--images",
    "--crf": "--images",
    "--tile": "--images",
    "--names": "--images",
}
PLACEHOLDER = {"--explain": "IMAGE", "--images": "PATH"}
PROGRAMS = ("--measure-sets", "--explain", "--images")


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds them to a command line."""
    parser.add_argument(
        "--measure-sets", action="store_true", help="hold positives and negatives against labels"
    )
    parser.add_argument("--export", help="write the checkpoint in the published format, to this file")
    parser.add_argument(
        "--list-backbones", action="store_true", help="list the published backbones and their options"
    )
    parser.add_argument(
        "--explain", metavar="IMAGE", help="draw one anchor's propagation: a file, or a validation index"
    )
    parser.add_argument("--patch", metavar="ROW,COL", help="--explain's anchor; default: the centre patch")
    images = parser.add_argument_group("masks for photographs, which need no labels and no data set")
    images.add_argument("--images", metavar="PATH", help="an image, or a folder of them")
    images.add_argument("--out", metavar="DIR", help="where masks, overlays and a legend go")
    images.add_argument("--res", type=int, help="pixels of the shorter side; default: dataset.val_res")
    images.add_argument("--head", choices=("cluster", "linear"), help="which probe; default: cluster")
    images.add_argument("--crf", action="store_true", help="refine masks as eval.crf_backend says")
    images.add_argument("--tile", type=int, help="take large images in overlapping tiles of so many pixels")
    images.add_argument("--names", help='names for the legend: "0=road,1=car", or a JSON file')


def flag_mistakes(arguments: argparse.Namespace) -> list[str]:
    """What is wrong with them, one line each."""
    values = {flag: _value(arguments, flag) for flag in (*BELONG, *PROGRAMS)}
    given = {flag for flag, value in values.items() if value is not None and value is not False}
    mistakes = []
    if len(programs := [flag for flag in PROGRAMS if flag in given]) > 1:
        mistakes.append(f"{' and '.join(programs)} are different programs: give one of them")
    if _value(arguments, "--explain") == "":
        mistakes.append("--explain is empty: name an image file, or give the index of a validation image")
    for flag, needed in BELONG.items():
        if flag in given and needed not in given:
            value = _value(arguments, flag)
            told = f"{flag} is given" if value is True else f"{flag} is {value}"
            mistakes.append(f"{told}, which belongs to {needed}: add {needed} {PLACEHOLDER[needed]}")
    for flag in ("--images", "--out"):
        if "--images" in given and not _value(arguments, flag):
            mistakes.append(f"{flag} is missing or empty: give --images PATH --out DIR")
    for read, flag in ((read_patch, "--patch"), (read_names, "--names")):
        try:
            read(_value(arguments, flag))
        except UserError as error:
            mistakes += error.mistakes
    return mistakes


def _value(arguments: argparse.Namespace, flag: str) -> str | int | bool | None:
    return getattr(arguments, flag.strip("-").replace("-", "_"), None)


def read_patch(text: str | None) -> tuple[int, int] | None:
    """(row, column) of --patch, or None where it is not given.

    Raises:
        UserError: not two whole numbers.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*", text, re.ASCII):
        raise UserError(f"--patch is {text}, must be row,col on the patch grid from 0, as in --patch 12,20")
    row, column = text.split(",")
    return int(row), int(column)
