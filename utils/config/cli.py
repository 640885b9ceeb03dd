"""The command line of run.py and eval.py: flags, overrides in Hydra's grammar, sweeps and variants."""

import argparse
import errno
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException

from utils.config.loading import FIELDS, build_options, find_option_file, flatten, read_option_file
from utils.config.options import Options
from utils.errors import UserError, first_line
from utils.files import read_json_object
from utils.training.launch import is_rank_zero, process_index

DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG)
QUOTING = """write key=value; quote values that contain spaces, commas or brackets twice: 'key="a, b"'"""
NEEDED_BY = dict.fromkeys(("out", "res", "head", "crf", "tile", "names"), "images") | {"patch": "explain"}


class Job(NamedTuple):
    """One run of a command line."""

    options: Options
    setting: str  # the variant and the swept values without the seed; '' if there is neither
    evaluate_only: bool  # --test
    base: str  # wandb.name without the sweep's suffix


class _Overrides(NamedTuple):
    choices: dict[str, list[Any]]  # more than one value if the key is swept
    mistakes: list[str]


def parse_arguments(argv: Sequence[str] | None, *, description: str, training: bool) -> argparse.Namespace:
    """Parses the flags; flags for options are stored under the option's key, overrides as strings."""
    parser = argparse.ArgumentParser(description=description)
    flag = parser.add_argument
    flag("--opt", help="option file: a path, or a name in json/ or json/server/")
    flag("--debug", dest="wandb.mode", action="store_const", const="disabled", help="disable wandb")
    flag("--test", action="store_true", help="evaluate only (eval.py always does)")
    flag("--checkpoint", help="checkpoint file, folder or name of a run")
    flag("--data_path", dest="dataset.data_path", metavar="DIR", help="folder of the data set")
    on = {"action": "store_const", "const": True}
    flag("--check", dest="dataset.check_files", **on, help="read all files first; stop if any is damaged")
    if training:
        flag("--resume", action="store_const", const="auto", help="continue from the last checkpoint")
        flag("--frozen", dest="train.frozen", **on, help="baseline: never update the head")
        flag("--variants", help="JSON file of named overrides, one run each: ablation.json")
    else:
        command = parser.add_mutually_exclusive_group().add_argument
        command("--measure-sets", action="store_true", help="compare positives and negatives with labels")
        command("--explain", metavar="IMAGE", help="plot an anchor of an image: a file or an index")
        command("--images", metavar="PATH", help="write masks of an image or of a folder")
        command("--export", metavar="FILE", help="write the checkpoint in the published format")
        flag("--patch", metavar="ROW,COL", type=_row_and_column, help="anchor; default: the centre patch")
        flag = parser.add_argument_group("with --images").add_argument
        flag("--out", metavar="DIR", help="folder for masks, overlays and a legend")
        flag("--res", type=int, help="pixels of the shorter side; default: dataset.val_res")
        flag("--head", choices=("cluster", "linear"), help="default: cluster")
        flag("--crf", action="store_true", help="refine masks with the CRF of eval.crf_backend")
        flag("--tile", type=int, help="split large images into overlapping tiles of this size")
        flag("--names", help='names for the legend: "0=road,1=car", or a JSON file')
    parser.add_argument("overrides", nargs="*", help="key=value, or key=a,b,c for a sweep")
    arguments = parser.parse_intermixed_args(argv)
    given = {name for name, value in vars(arguments).items() if value not in (None, False)}
    for name in given & NEEDED_BY.keys():
        if NEEDED_BY[name] not in given:
            parser.error(f"--{name} is only allowed with --{NEEDED_BY[name]}")
    if "images" in given and "out" not in given:
        parser.error("--images needs --out, the folder to write to")
    if arguments.opt is None and not {"export", "checkpoint"} <= given:  # an export needs no options
        parser.error("--opt is missing: name an option file, such as --opt demo.json")
    return arguments


def _row_and_column(text: str) -> tuple[int, int]:
    row, column = map(int, text.split(","))
    return row, column


def plan_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Plans all runs of a command line and validates them, so that all mistakes are reported at once."""
    path, flags = find_option_file(arguments.opt or "demo.json"), vars(arguments)
    stored, (choices, mistakes) = read_option_file(path), parse_overrides(arguments.overrides)
    variants: dict[str, Any] = {"": {}}
    if flags.get("variants"):
        file = find_option_file(flags["variants"], asked="--variants")
        variants = read_json_object(file)
        if not variants or not all(isinstance(changed, dict) for changed in variants.values()):
            raise UserError(f"{file}: must map names to objects of options, such as {{'name': {{}}}}")
    given = {key: value for key, value in flags.items() if key in FIELDS and value is not None}
    jobs = []
    for (variant, changed), *combination in itertools.product(variants.items(), *choices.values()):
        chosen, changed = given | dict(zip(choices, combination, strict=True)), flatten(changed)
        twice = changed.keys() & chosen
        mistakes += [f"{variant}: {key} is also set by the command line; remove one" for key in twice]
        flat = stored | chosen | changed
        base = flat.setdefault("wandb.name", Options().wandb.name)
        swept = {key: value for key, value in chosen.items() if len(choices.get(key, ())) > 1}
        words = [variant, *(f"{key.split('.')[-1]}={value}" for key, value in swept.items())]
        setting = [variant, *(f"{key}={value}" for key, value in swept.items() if key != "train.seed")]
        suffix = "".join(f"-{word}" for word in words if word)
        for key in ("wandb.name", "wandb.id"):
            if suffix and flat.get(key):
                flat[key] = re.sub(r"[^\w.=+-]+", "_", f"{flat[key]}{suffix}")
        try:
            options = build_options(flat, source="", check_files=not flags.get("images"))
            jobs.append(Job(options, " ".join(filter(None, setting)), arguments.test, str(base)))
        except UserError as error:
            mistakes += error.mistakes
    if mistakes:
        raise UserError(dict.fromkeys(mistakes), f"{path} and the command line")
    return jobs


def parse_overrides(words: Sequence[str]) -> _Overrides:
    """Reads overrides with Hydra's parser: `key=value`, and the sweeps `key=1,2` and `key=range(1,4)`."""
    choices, mistakes = {}, []
    parser = OverridesParser.create()
    for word in words:
        try:
            override = parser.parse_override(word)
            key, values = override.key_or_group, [override.value()]
            if override.is_sweep_override():
                texts = override.sweep_string_iterator()
                values = [parser.parse_override(f"{key}={text}").value() for text in texts]
            if override.type is not OverrideType.CHANGE or override.package is not None or not values:
                raise ValueError("not a value or a sweep of an existing key")
            choices[key] = values
        except (HydraException, ValueError) as error:
            mistakes.append(f"{word}: {first_line(error)}; {QUOTING}")
    return _Overrides(choices, mistakes)


def guarded(main: Callable[[], None], *, then: str = "rerun with --resume") -> int:
    """Runs a program and returns its exit status; prints a user's mistake once, with no traceback."""
    process = "" if is_rank_zero() else f" in process {'.'.join(map(str, process_index()))}"
    if process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, closed with the process
    try:
        main()
        status, message = 0, ""
    except UserError as error:
        reported = process and error.common  # by the first process
        status, message = (0, "") if reported else (error.status, f"{error.label}{process}: {error}")
    except KeyboardInterrupt:
        status, message = 130, f"interrupted; {then}"
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or "output_dir"
        status, message = 2, f"error: {where}: {error.strerror}; fix this, then {then}"
    if message:
        print(message, file=sys.stderr)
    return status
