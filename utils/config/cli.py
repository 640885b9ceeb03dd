"""The command line of run.py and eval.py: flags, overrides in Hydra's grammar, sweeps and variants."""

import argparse
import errno
import itertools
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException

from utils.config.loading import (
    FIELDS,
    as_tree,
    build_options,
    find_option_file,
    flatten,
    missing_files,
    read_option_file,
)
from utils.config.options import Options
from utils.config.plugins import load_plugins, with_absolute_plugins
from utils.errors import Interrupted, UserError, stdout_is_lost
from utils.files import read_json_object
from utils.training.launch import is_rank_zero, started_by_lightning
from utils.training.stopping import end_with_parent

DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG)
QUOTING = """must be key=value or key=a,b,c, no spaces around =; quote other values twice: 'key="a, b"'"""
NEEDS = {"images": ("out",), "explore": ("out",), "out": ("images", "explore"), "patch": ("explain",)}
NEEDS |= dict.fromkeys(("flat", "res", "head", "crf", "tile", "names"), ("images",))


class Job(NamedTuple):
    """One run of a command line."""

    options: Options
    setting: str  # the variant and the swept values without the seed; '' if there is neither
    base: str  # wandb.name without the sweep's suffix


def parse_arguments(
    argv: Sequence[str] | None, *, description: str, examples: str, training: bool
) -> argparse.Namespace:
    """Parses the flags; flags for options are stored under the option's key, overrides as strings."""
    epilog = f"examples:\n{examples}\n\nAll options are described in json/README.md."
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=layout)
    flag, path = parser.add_argument, {"type": os.path.expanduser}
    flag("--opt", **path, help="option file: a path, or a name in json/ or its subfolders")
    flag("--debug", dest="wandb.mode", action="store_const", const="disabled", help="disable wandb")
    flag("--test", action="store_true", help="evaluate only (eval.py always does)")
    flag("--checkpoint", **path, help="checkpoint file, folder or name of a run")
    data = {"dest": "dataset.data_path", "metavar": "DIR", **path}
    flag("--data_path", "--data-path", **data, help="folder of the data set")
    on = {"action": "store_const", "const": True}
    flag("--check", dest="dataset.check_files", **on, help="read all files first; stop if any is damaged")
    flag("--print-options", action="store_true", help="print the resolved options and exit")
    if training:
        flag("--resume", action="store_const", const="auto", help="continue from the last checkpoint")
        flag("--frozen", dest="train.frozen", **on, help="baseline: never update the head")
        suggests = "suggest boundaries from frozen features of the train images and exit; reads no labels"
        flag("--suggest", action="store_true", help=suggests)
        flag("--variants", **path, help="JSON file of named overrides, one run each: ablation.json")
    else:
        _add_evaluation_flags(parser)
    parser.add_argument("overrides", nargs="*", help="key=value, or key=a,b,c for a sweep")
    arguments = parser.parse_intermixed_args(argv)
    given = {name for name, value in vars(arguments).items() if value not in (None, False)}
    for name in given & NEEDS.keys():
        if not given.intersection(NEEDS[name]):
            parser.error(f"--{name} needs --{' or --'.join(NEEDS[name])}")
    if arguments.opt is None and (training or arguments.checkpoint is None):
        missing = "--opt is missing: name an option file, such as --opt demo.json"
        parser.error(missing if training else f"{missing}, or a checkpoint of this project with --checkpoint")
    return arguments


def _add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    path = {"type": os.path.expanduser}
    trust = {"action": "store_true", "help": "run the plugins that a checkpoint names"}
    parser.add_argument("--trust-plugins", **trust)
    parser.set_defaults(test=True)  # weights come from a checkpoint
    command = parser.add_mutually_exclusive_group().add_argument
    command("--measure-sets", action="store_true", help="compare positives and negatives with labels")
    command("--explain", metavar="IMAGE", **path, help="plot the propagation of an anchor; file or index")
    command("--explore", metavar="PATH", **path, help="write a page to explore an image, folder or index")
    command("--images", metavar="PATH", **path, help="write masks of an image or of a folder")
    command("--export", metavar="FILE", **path, help="write the checkpoint in the published format")
    row = {"metavar": "ROW,COL", "type": _row_and_column}
    parser.add_argument("--patch", **row, help="anchor; default: the centre patch")
    flag = parser.add_argument_group("with --images").add_argument
    flag("--out", metavar="PATH", **path, help="folder for masks and index.html; with --explore the page")
    flag("--flat", action="store_true", help="write <name>.png instead of a folder for each image")
    flag("--res", type=int, help="pixels of the shorter side; default: dataset.val_res")
    flag("--head", choices=("cluster", "linear"), help="probe to use; default: cluster")
    flag("--crf", action="store_true", help="refine masks with the CRF of eval.crf_backend")
    flag("--tile", type=int, help="split large images into overlapping tiles of this size")
    flag("--names", **path, help='names for the legend: "0=road,1=car", or a JSON file')


def _row_and_column(text: str) -> tuple[int, int]:
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be ROW,COL, such as 3,12") from None
    return row, column


def plan_jobs(arguments: argparse.Namespace, stored: dict[str, Any] | None = None) -> list[Job]:
    """Plans all runs of a command line and validates them, so that all mistakes are reported at once.

    `stored` are the flat options of a checkpoint, instead of those of --opt.
    """
    flags, (choices, mistakes) = vars(arguments), parse_overrides(arguments.overrides)
    source, stored = f"the options of {arguments.checkpoint}", stored or {}
    if arguments.opt is not None:
        source = find_option_file(arguments.opt)
        stored = read_option_file(source)
    given = {key: value for key, value in flags.items() if key in FIELDS and value is not None}
    trusted = arguments.opt is not None or "plugins" in choices or flags.get("trust_plugins", False)
    jobs = []
    for (variant, changed), *combination in itertools.product(_variants(flags), *choices.values()):
        chosen = given | dict(zip(choices, combination, strict=True))
        chosen = with_absolute_plugins(chosen, Path())
        twice = changed.keys() & chosen
        mistakes += [f"{variant}: {key} is also set by the command line; remove one" for key in twice]
        flat = stored | chosen | changed
        base = str(flat.setdefault("wandb.name", Options().wandb.name))
        swept = {key: value for key, value in chosen.items() if len(choices.get(key, ())) > 1}
        words = [variant, *(f"{key.split('.')[-1]}={value}" for key, value in swept.items())]
        setting = [variant, *(f"{key}={value}" for key, value in swept.items() if key != "train.seed")]
        suffix = "".join(f"-{word}" for word in words if word)
        for key in ("wandb.name", "wandb.id"):
            if suffix and flat.get(key):
                flat[key] = re.sub(r"[^\w.=+-]+", "_", f"{flat[key]}{suffix}")
        try:
            load_plugins(flat, trusted=trusted)
            options = build_options(flat, source="")
            jobs.append(Job(options, " ".join(filter(None, setting)), base))
        except UserError as error:
            mistakes += error.mistakes
        if not any(flags.get(name) for name in ("images", "explore", "export")):  # they need no data set
            mistakes += missing_files(flat, weights=not arguments.test)
    names = Counter(job.options.wandb.name for job in jobs)
    mistakes += [f"several runs would be called {name}; change one" for name in names if names[name] > 1]
    if len({job.options.trainer.world_size for job in jobs}) > 1:
        mistakes.append("trainer: the runs differ in their number of processes; give each its own command")
    if mistakes:
        raise UserError(dict.fromkeys(mistakes), f"{source} and the command line")
    return jobs


def print_options(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Prints the options of each job as JSON, which is an option file."""
    trees = [as_tree(job.options) for job in jobs]
    print("\n".join(json.dumps(tree, indent=2) for tree in trees))
    return trees


def _variants(flags: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and changed options of each variant; one without a name if there is no --variants."""
    if not flags.get("variants"):
        return [("", {})]
    file = find_option_file(flags["variants"], asked="--variants")
    variants = read_json_object(file)
    if not variants or not all(isinstance(changed, dict) for changed in variants.values()):
        raise UserError(f"{file}: must map names to objects of options, such as {{'name': {{}}}}")
    return [(name, with_absolute_plugins(flatten(tree), file.parent)) for name, tree in variants.items()]


def parse_overrides(words: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Reads `key=value`, and the sweeps `key=1,2` and `key=range(1,4)`, with Hydra's parser.

    Returns the values of each key, more than one if it is swept, and the mistakes.
    """
    choices, malformed = {}, []
    parser = OverridesParser.create()
    for word in words:
        key, equals, value = word.partition("=")
        try:
            override = parser.parse_override(f"{key}{equals}{os.path.expanduser(value)}")
            key, values = override.key_or_group, [override.value()]
            if override.is_sweep_override():
                texts = override.sweep_string_iterator()
                values = [parser.parse_override(f"{key}={text}").value() for text in texts]
            plain = override.type is OverrideType.CHANGE and override.package is None
            if not (plain and key and values):
                raise ValueError("not a value or a sweep of an existing key")
            choices[key] = values
        except (HydraException, ValueError):
            malformed.append(word)
    return choices, [f"{' '.join(malformed)}: {QUOTING}"] if malformed else []


def guarded(main: Callable[[], None], *, then: str = "rerun with --resume") -> int:
    """Runs a program and returns its exit status; prints a user's mistake once, with no traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names that are not UTF-8
    try:
        if not is_rank_zero():
            if started_by_lightning():  # otherwise it may wait in NCCL for a main process that was killed
                end_with_parent()
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, closed with the process
        main()
        sys.stdout.flush()
        return 0
    except UserError as error:
        if error.common and not is_rank_zero():  # reported by the first process
            return 0
        status, message = error.status, f"{error.label}: {error}"
    except Interrupted as error:
        if error.code == 128 + signal.SIGUSR1 and not is_rank_zero():  # or srun would end the first process
            return 0
        status, message = error.code, f"interrupted; {then}"
    except OSError as error:
        lost = stdout_is_lost()
        if isinstance(error, BrokenPipeError):  # `| head` has read enough
            return 128 + signal.SIGPIPE
        if not lost and error.errno not in DISK_ERRORS:
            raise
        where = error.filename or ("standard output" if lost else "output_dir")
        status, message = 2, f"error: {where}: {error.strerror}; fix this, then {then}"
    print(message, file=sys.stderr)
    return status
