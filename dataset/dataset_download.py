"""Downloads a data set, checks it, and says what to run next.

    python dataset/dataset_download.py cocostuff --root <folder>
    python -m dataset.dataset_download cocostuff --root <folder>

Stopped at any moment, the same command goes on where it was; when all is there it does nothing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # run as a file: what is imported below lies in the project's root, not in dataset/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from utils.config.cli import guarded
from utils.download.acquire import Means, acquire, describe, pending, unpack_archives
from utils.download.sources import TARGETS, Target
from utils.download.transfer import Patience
from utils.errors import Interrupted, UserError


def main(
    argv: Sequence[str] | None = None,
    *,
    targets: Mapping[str, Target] = TARGETS,
    patience: Patience | None = None,
) -> None:
    """Runs the command line.

    Raises:
        UserError: a mistake on the command line, no address that answers, a damaged archive, too little
            space, or a data set that is not complete afterwards.
    """
    arguments = parse_arguments(argv, targets=targets)
    target, root = targets[arguments.target], Path(arguments.root)
    mistakes = _mistakes(arguments, target, root)
    if mistakes:
        raise UserError(mistakes, "the command line")
    means = Means(root, arguments.mirror, arguments.keep_archives, patience or Patience())
    try:
        _run(target, means, name=arguments.target, dry=arguments.dry_run)
    except KeyboardInterrupt:
        raise Interrupted(
            f"what is fetched stays in {root} (unfinished as .part), the same command goes on from there"
        ) from None
    except OSError as error:
        place = error.filename or root
        raise UserError(f"{place}: {error.strerror or error}; mend that or choose another --root") from None


def parse_arguments(
    argv: Sequence[str] | None, *, targets: Mapping[str, Target] = TARGETS
) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="Downloads a data set, checks it, says what to run next.")
    parser.add_argument("target", choices=list(targets), help="the data set")
    parser.add_argument("--root", required=True, help="its folder: what --data_path will be")
    parser.add_argument("--mirror", default="", help="http(s) address that is tried before all others")
    parser.add_argument("--keep-archives", action="store_true", help="do not remove what is unpacked")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    return parser.parse_args(argv)


def _mistakes(arguments: argparse.Namespace, target: Target, root: Path) -> list[str]:
    mistakes = []
    if root.exists() and not root.is_dir():
        mistakes.append(f"--root is {root}: a file; name a folder")
    if arguments.mirror and not arguments.mirror.startswith(("http://", "https://")):
        mistakes.append(f"--mirror is {arguments.mirror}: must begin with http:// or https://")
    if arguments.mirror and target.instructions:
        mistakes.append(f"--mirror has no effect for {arguments.target}: nothing is downloaded; leave it out")
    return mistakes


def _run(target: Target, means: Means, *, name: str, dry: bool) -> None:
    root = means.root
    finding, left = target.check(root), pending(target, root)
    if not finding.mistakes and not left:
        print(f"{root}: {name} is complete already, nothing to do")
        _conclude(target, root, finding.counts)
        return
    if finding.mistakes and target.instructions:
        print(target.instructions.format(root=shlex.quote(str(root))), flush=True)
    if dry:
        lines = [f"would unpack: {archive.name}" for archive in left]
        lines = describe(target, means) if finding.mistakes else lines
        print("\n".join([*lines, "a dry run: nothing was written"]))
        return
    root.mkdir(parents=True, exist_ok=True)
    if finding.mistakes:
        acquire(target, means)
    else:
        unpack_archives(left, means)
    finding = target.check(root)
    if finding.mistakes:
        hint = "fetch what is missing as said above, and run this again"
        if not target.instructions:
            hint = (
                f"what was fetched does not hold it: remove {root / 'download.json'} to fetch all of it anew"
            )
        raise UserError([*finding.mistakes, hint], f"{root}, which is not a complete {name}")
    print(f"{root}: {name} is complete")
    _conclude(target, root, finding.counts)


def _conclude(target: Target, root: Path, counts: Mapping[str, int]) -> None:
    print("\n".join(f"  {name}: {count:,}" for name, count in counts.items()))
    commands = [command.format(root=shlex.quote(str(root))) for command in target.commands]
    print("\n".join(["next:", *(f"  {command}" for command in commands)]))


if __name__ == "__main__":
    sys.exit(guarded(main, then="give the same command again"))
