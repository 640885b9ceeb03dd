"""The command line of run.py and eval.py: flags, overrides in Hydra's grammar, sweeps and variants."""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException

from utils.config.loading import find_option_file, flatten, load_options, with_changes
from utils.config.options import Options
from utils.errors import UserError, first_line
from utils.files import read_json_object
from utils.training.launch import is_rank_zero, process_index

DEMO = "demo.json"
DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG)
QUOTING = """write key=value; quote values with spaces, commas or brackets twice: 'key="a, b"'"""
IMAGE_FLAGS = ("out", "res", "head", "crf", "tile", "names")


@dataclass(frozen=True)
class Job:
    """One run of a command line.

    Attributes:
        options: validated options.
        setting: the variant and the swept values without the seed; '' if there is neither.
        evaluate_only: whether `--test` was given.
        base: `wandb.name` without the sweep's suffix.
    """

    options: Options
    setting: str
    evaluate_only: bool
    base: str


def parse_arguments(argv: Sequence[str] | None, *, description: str, training: bool) -> argparse.Namespace:
    """Parses the flags; overrides are left as words in `overrides`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--opt", help="option file: a path, or a name in json/ or json/server/")
    parser.add_argument("--debug", action="store_true", help="disable wandb")
    parser.add_argument("--test", action="store_true", help="evaluate only (eval.py always does)")
    parser.add_argument("--checkpoint", help="checkpoint file, folder or name of a run")
    parser.add_argument("--data_path", help="folder of the data set")
    parser.add_argument("--check", action="store_true", help="read all files first; stop if any is damaged")
    if training:
        parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
        parser.add_argument("--frozen", action="store_true", help="baseline: never update the head")
        parser.add_argument("--variants", help="JSON file of named overrides, one run each: ablation.json")
    else:
        _add_evaluation_flags(parser)
    parser.add_argument("overrides", nargs="*", help="key=value, or key=a,b,c for a sweep")
    arguments = parser.parse_intermixed_args(argv)
    if not training:
        stray = [flag for flag in IMAGE_FLAGS if _given(arguments, flag) and not arguments.images]
        if stray:
            parser.error(f"--{stray[0]} is only allowed with --images")
        if arguments.patch and not arguments.explain:
            parser.error("--patch is only allowed with --explain")
        if arguments.images and not arguments.out:
            parser.error("--images needs --out, the folder to write to")
    if arguments.opt is None:
        if training or not (arguments.export and arguments.checkpoint):
            parser.error("--opt is missing: name an option file, such as --opt demo.json")
        arguments.opt = DEMO
    return arguments


def _add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    program = parser.add_mutually_exclusive_group()
    program.add_argument(
        "--measure-sets", action="store_true", help="score positives and negatives by labels"
    )
    program.add_argument("--explain", metavar="IMAGE", help="plot an anchor: a file or a validation index")
    program.add_argument("--images", metavar="PATH", help="write masks of an image or a folder of images")
    program.add_argument("--export", metavar="FILE", help="write the checkpoint in the published format")
    parser.add_argument("--patch", metavar="ROW,COL", type=_patch, help="anchor; default: the centre patch")
    images = parser.add_argument_group("with --images")
    images.add_argument("--out", metavar="DIR", help="folder for masks, overlays and a legend")
    images.add_argument("--res", type=int, help="pixels of the shorter side; default: dataset.val_res")
    images.add_argument("--head", choices=("cluster", "linear"), help="default: cluster")
    images.add_argument("--crf", action="store_true", help="refine masks by eval.crf_backend")
    images.add_argument("--tile", type=int, help="split large images into overlapping tiles of this size")
    images.add_argument("--names", help='names for the legend: "0=road,1=car", or a JSON file')


def _patch(text: str) -> tuple[int, int]:
    """The type of --patch."""
    if not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text} must be row,col on the patch grid from 0, such as 12,20")
    row, column = text.split(",")
    return int(row), int(column)


def _given(arguments: argparse.Namespace, flag: str) -> bool:
    return getattr(arguments, flag, None) not in (None, False)


def plan_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Plans all runs of a command line and validates them before the first one starts.

    Raises:
        UserError: lists all mistakes in the option file, the overrides and their combinations.
    """
    path = find_option_file(arguments.opt)
    choices, mistakes = parse_overrides(arguments.overrides)
    fixed = _options_of_flags(arguments)
    file = getattr(arguments, "variants", None)
    variants = read_variants(file, given={*fixed, *choices}) if file else {"": {}}
    masking = _given(arguments, "images")
    if masking and any(len(values) > 1 for values in choices.values()):
        mistakes.append("--images takes one setting: remove the sweep, or run it once per value")
    jobs = []
    for (variant, changed), *combination in itertools.product(variants.items(), *choices.values()):
        chosen = dict(zip(choices, combination, strict=True))
        swept = {key: value for key, value in chosen.items() if len(choices[key]) > 1}
        words = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in swept.items()]
        try:
            plain = load_options(path, fixed | chosen | changed, check_files=not masking)
            options = _named(plain, words=[variant, *words])
        except UserError as error:
            mistakes += error.mistakes
            continue
        setting = [variant, *(f"{key}={value}" for key, value in swept.items() if key != "train.seed")]
        jobs.append(Job(options, " ".join(filter(None, setting)), arguments.test, plain.wandb.name))
    names = Counter(job.options.wandb.name for job in jobs)
    mistakes += [
        f"wandb.name {name} is used by {count} runs; rename variants"
        for name, count in names.items()
        if count > 1
    ]
    if mistakes:
        raise UserError(dict.fromkeys(mistakes), f"{path} and the command line")
    return jobs


def _options_of_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that flags stand for."""
    needs_checkpoint = not any(_given(arguments, flag) for flag in ("measure_sets", "explain"))
    options = {
        "checkpoint": arguments.checkpoint if needs_checkpoint else "",
        "dataset.data_path": arguments.data_path,
        "dataset.check_files": True if arguments.check else None,
        "wandb.mode": "disabled" if arguments.debug else None,
        "resume": "auto" if _given(arguments, "resume") else None,
        "train.frozen": True if _given(arguments, "frozen") else None,
    }
    return {key: value for key, value in options.items() if value is not None}


def read_variants(name: str, *, given: set[str]) -> dict[str, dict[str, Any]]:
    """Flat overrides by name from a file such as {"no propagation": {"training_coeff": {"prop_iter": 0}}}.

    Args:
        name: a path, or a name in json/.
        given: keys that the command line sets; variants must not set them too.

    Raises:
        UserError: not such a file, or a variant sets one of these keys.
    """
    path = find_option_file(name, asked="--variants")
    variants = read_json_object(path)
    if not variants:
        raise UserError(f"{path}: has no variants; add one, such as {{'name': {{}}}}")
    mistakes, flat = [], {}
    for variant, changed in variants.items():
        if not isinstance(changed, dict):
            mistakes.append(f"{variant} is {json.dumps(changed)}, must be an object of options")
            continue
        flat[variant] = flatten(changed)
        twice = [key for key in flat[variant] if key in given]
        mistakes += [f"{variant}: {key} is also set by the command line; remove one" for key in twice]
    if mistakes:
        raise UserError(mistakes, str(path))
    return flat


def _named(options: Options, *, words: Sequence[str]) -> Options:
    """Appends the variant and the swept values to the run's name and id."""
    words = [word for word in words if word]
    own = {"wandb.name": options.wandb.name, "wandb.id": options.wandb.id}
    names = {
        key: re.sub(r"[^\w.=+-]+", "_", "-".join([value, *words])) for key, value in own.items() if value
    }
    return with_changes(options, names) if words else options


class Overrides(NamedTuple):
    """The values of each dotted key, several if it is swept; and one line per mistake."""

    choices: dict[str, list[Any]]
    mistakes: list[str]


def parse_overrides(words: Sequence[str]) -> Overrides:
    """Reads overrides with Hydra's parser: `key=value`, and the sweeps `key=1,2` and `key=range(1,4)`."""
    found = Overrides({}, [])
    parser = OverridesParser.create()
    for word in words:
        try:
            override = parser.parse_override(word)
            key, values = override.key_or_group, [override.value()]
            if override.is_sweep_override():
                if getattr(values[0], "shuffle", False):
                    raise ValueError("sweeps are not shuffled")
                texts = override.sweep_string_iterator()
                values = [parser.parse_override(f"{key}={text}").value() for text in texts]
        except (HydraException, ValueError) as error:
            found.mistakes.append(f"{word}: not an override ({first_line(error)}); {QUOTING}")
            continue
        if override.type is not OverrideType.CHANGE or override.package is not None:
            found.mistakes.append(f"{word}: keys can only be changed, not added or deleted; {QUOTING}")
        elif key in found.choices:
            found.mistakes.append(f"{word}: {key} is given twice; keep one")
        elif not values:
            found.mistakes.append(f"{word}: the range is empty; give it at least one value")
        else:
            found.choices[key] = values
    return found


def guarded(main: Callable[[], None], *, then: str = "rerun with --resume") -> int:
    """Runs a program and returns its exit status; a user's mistake is printed without a traceback.

    Only the first of several processes prints; the others print mistakes that they alone have met.

    Args:
        main: the program.
        then: what to do after an interruption, or once a disk error is fixed.
    """
    if not is_rank_zero():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, closed with the process
    try:
        main()
    except UserError as error:
        if not is_rank_zero() and error.common:
            return 0  # the first process reports it
        process = "" if is_rank_zero() else f" in process {'.'.join(map(str, process_index()))}"
        print(f"{error.label}{process}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"interrupted; {then}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or "output_dir"
        print(f"error: {where}: {error.strerror}; fix this, then {then}", file=sys.stderr)
        return 2
    return 0
