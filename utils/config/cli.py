"""The command line that run.py and eval.py share: flags, overrides in Hydra's grammar, sweeps."""

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Override,
    OverrideType,
    QuotedString,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException

from utils.config.evaluation_flags import add_evaluation_flags, flag_mistakes
from utils.config.loading import find_option_file, flatten, load_options
from utils.config.options import Options
from utils.config.wandb_options import name_mistake
from utils.errors import UserError, first_line
from utils.files import read_json_object
from utils.training.launch import is_rank_zero, process_index

DEMO = "demo.json"
DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG)
NO_CHECKPOINT = ("measure_sets", "explain")  # flags that look at frozen features alone
QUOTING = """write key=value; quote a value with spaces, commas or brackets twice: 'key="a, b"'"""


@dataclass(frozen=True)
class Job:
    """One run of a command line.

    Attributes:
        options: checked and resolved.
        setting: the variant and what the sweep changes for this run, '' where there is neither; without
            the seed.
        evaluate_only: whether `--test` was given.
        base: `wandb.name` without what a sweep adds to it.
    """

    options: Options
    setting: str
    evaluate_only: bool
    base: str


def parse_arguments(argv: Sequence[str] | None, *, description: str, training: bool) -> argparse.Namespace:
    """The flags; further words are left in `overrides`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--opt", help="option file: a path, or a name in json/, json/server/")
    parser.add_argument("--debug", action="store_true", help="no wandb")
    parser.add_argument("--test", action="store_true", help="evaluate only (eval.py does nothing else)")
    parser.add_argument("--checkpoint", help="a file, a folder or the name of a run")
    parser.add_argument("--data_path", help="folder of the data set")
    parser.add_argument("--check", action="store_true", help="first read every file, stop if one is damaged")
    if training:
        parser.add_argument("--resume", action="store_true", help="go on where this run was left")
        parser.add_argument("--frozen", action="store_true", help="baseline: never update the head")
        parser.add_argument("--variants", help="JSON file of named overrides, each a run: ablation.json")
        parser.add_argument("--verify-run", metavar="DIR", help="evaluate a finished run anew and compare")
        parser.add_argument(
            "--make-demo-weights", action="store_true", help="train the backbone that the demo starts from"
        )
    else:
        add_evaluation_flags(parser)
    parser.add_argument("overrides", nargs="*", help="key=value, or key=a,b,c for a sweep")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.opt is None and not _needs_no_options(arguments):
        parser.error("--opt is missing: name an option file, such as --opt demo.json")
    arguments.opt = arguments.opt or DEMO
    return arguments


def _needs_no_options(arguments: argparse.Namespace) -> bool:
    exporting = getattr(arguments, "export", None) and arguments.checkpoint
    return exporting or any(
        getattr(arguments, flag, False) for flag in ("make_demo_weights", "verify_run", "list_backbones")
    )


def plan_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Every run that the command line asks for, all checked before the first one starts.

    Raises:
        UserError: a mistake in the option file, in an override or in a combination of them.
    """
    run = getattr(arguments, "verify_run", None)  # which has its own options
    path = Path(run) / "options.json" if run else find_option_file(arguments.opt)
    making = getattr(arguments, "make_demo_weights", False)
    masking = getattr(arguments, "images", None)
    check_files = not (making or masking)  # weights are yet to come; photographs need no data set
    fixed = _set_by_flags(arguments)
    overrides = parse_overrides(arguments.overrides)
    choices, mistakes = overrides.choices, [*flag_mistakes(arguments), *overrides.mistakes]
    file = getattr(arguments, "variants", None)
    variants = read_variants(file, given={*fixed, *choices}) if file else {"": {}}
    if making and (file or any(len(values) > 1 for values in choices.values())):
        mistakes.append("--make-demo-weights makes one file: leave out --variants and sweeps")
    if masking and any(len(values) > 1 for values in choices.values()):
        mistakes.append("--images takes one setting: leave out sweeps, or give each its own --out")
    jobs = []
    for (variant, changed), *combination in itertools.product(variants.items(), *choices.values()):
        chosen = dict(zip(choices, combination, strict=True))
        swept = {key: value for key, value in chosen.items() if len(choices[key]) > 1}
        words = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in swept.items()]
        try:
            plain = load_options(path, fixed | chosen | changed, check_files=check_files)
            options = _named(plain, words=[variant, *words])
        except UserError as error:
            mistakes += error.mistakes
            continue
        setting = [variant, *(f"{key}={value}" for key, value in swept.items() if key != "train.seed")]
        jobs.append(Job(options, " ".join(filter(None, setting)), arguments.test, plain.wandb.name))
    names = Counter(job.options.wandb.name for job in jobs)
    mistakes += [
        f"wandb.name {name} is that of {n} runs; rename variants" for name, n in names.items() if n > 1
    ]
    if mistakes:
        raise UserError(dict.fromkeys(mistakes), f"{path} and the command line")
    return jobs


def _set_by_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that flags stand for."""
    frozen_features = any(getattr(arguments, flag, None) for flag in NO_CHECKPOINT)
    flags = {
        "checkpoint": "" if frozen_features else arguments.checkpoint,
        "dataset.data_path": arguments.data_path,
        "dataset.check_files": True if arguments.check else None,
        "wandb.mode": "disabled" if arguments.debug else None,
        "resume": "auto" if getattr(arguments, "resume", False) else None,
        "train.frozen": True if getattr(arguments, "frozen", False) else None,
    }
    return {key: value for key, value in flags.items() if value is not None}


def read_variants(name: str, *, given: set[str]) -> dict[str, dict[str, Any]]:
    """The named overrides of a file, {"no propagation": {"training_coeff": {"prop_iter": 0}}, ...}.

    Args:
        name: a path, or a name in json/.
        given: keys that the command line sets.

    Raises:
        UserError: not such a file, or it changes a key that the command line sets as well.
    """
    path = find_option_file(name, asked="--variants")
    variants = read_json_object(path)
    mistakes = [
        f"{variant}: is {json.dumps(changed)}, must be an object of options"
        for variant, changed in variants.items()
        if not isinstance(changed, dict)
    ]
    if mistakes or not variants:
        raise UserError(mistakes or "holds no variant", str(path))
    flat = {variant: flatten(changed) for variant, changed in variants.items()}
    for variant, changed in flat.items():
        mistakes += [f"{variant}: {key} is set by the command line too" for key in changed if key in given]
    if mistakes:
        raise UserError(mistakes, str(path))
    return flat


def _named(options: Options, *, words: Sequence[str]) -> Options:
    """The same options for a run whose name, and id, tell its variant and what the sweep changes."""
    words = [word for word in words if word]
    if not words:
        return options
    name, id = (
        None if own is None else re.sub(r"[^\w.=+-]+", "_", "-".join([own, *words]))
        for own in (options.wandb.name, options.wandb.id)
    )
    if mistake := name_mistake(name):
        raise UserError(mistake)
    return replace(options, wandb=replace(options.wandb, name=name, id=id))


@dataclass(frozen=True)
class Overrides:
    """What the further words ask for.

    Attributes:
        choices: dotted key -> the values it is to take, one unless it is swept.
        mistakes: one line for each word that is no plain change.
    """

    choices: dict[str, list[Any]]
    mistakes: list[str]


def parse_overrides(words: Sequence[str]) -> Overrides:
    """Reads overrides with Hydra's own parser.

    Plain changes (`key=value`) and choice or range sweeps (`key=1,2`, `key=range(1,4)`) are taken; what
    else the grammar has (adding, deleting, packages, globs, intervals, shuffles) is a mistake here.
    """
    choices: dict[str, list[Any]] = {}
    mistakes = []
    parser = OverridesParser.create()
    for word in words:
        try:
            override = parser.parse_override(word)
            reason = _beyond_plain(override)
            values = [] if reason else _values(override)
        except (HydraException, ValueError) as error:
            mistakes.append(f"{word}: not an override ({first_line(error)}); {QUOTING}")
            continue
        if reason is not None:
            mistakes.append(f"{word}: {reason}; {QUOTING}")
        elif override.key_or_group in choices:
            mistakes.append(f"{word}: {override.key_or_group} is given twice; keep one")
        elif not values:
            mistakes.append(f"{word}: the range is empty; give it at least one value")
        else:
            choices[override.key_or_group] = values
    return Overrides(choices, mistakes)


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    return [_plain(value) for value in override.sweep_iterator(transformer=Transformer.identity)]


def _beyond_plain(override: Override) -> str | None:
    if override.type is not OverrideType.CHANGE:
        return "keys cannot be added or deleted, only changed"
    if override.package is not None:
        return "packages (@) mean nothing here"
    if override.is_sweep_override():
        sweep = override.value()
        if not isinstance(sweep, (ChoiceSweep, RangeSweep)):
            return "only choice and range sweeps are run"
        if sweep.shuffle or sweep.tags:
            return "shuffles and tags are not run"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def guarded(main: Callable[[], None], *, then: str = "go on with --resume") -> int:
    """Runs a program; a user's mistake is shown without a traceback and gives its exit status.

    Of several processes the first alone prints, but for the mistakes that another one has met alone.

    Args:
        main: the program.
        then: what to do after an interruption, or once a fault of the disk is mended.
    """
    if not is_rank_zero():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, closed with the process
    try:
        main()
    except UserError as error:
        if is_rank_zero():
            print(f"{error.label}: {error}", file=sys.stderr)
        elif error.common:
            return 0  # the first process tells
        else:
            print(f"{error.label} in process {'.'.join(map(str, process_index()))}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"interrupted; {then}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or "output_dir"
        print(f"error: {where}: {error.strerror}; mend that, then {then}", file=sys.stderr)
        return 2
    return 0
