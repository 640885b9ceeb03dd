"""The exceptions that end a program, and helpers for their messages."""

import os
import signal
import sys
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any, NoReturn

SHOWN = 20  # lines of a long list in a message
SIMILAR = 0.68  # likeness from which a key is suggested


class UserError(Exception):
    """One or several mistakes in options, files or data, found in `heading`; shown without a traceback."""

    status = 2  # exit status of the program
    label = "error"  # first word of the message
    common = False  # whether all processes of a run raise it together

    def __init__(self, mistakes: str | Iterable[str], heading: str = "") -> None:
        if isinstance(mistakes, str):  # torch turns a worker's traceback into the text
            mistakes = [mistakes.rsplit(f"{UserError.__module__}.UserError: ", 1)[-1].strip()]
        self.mistakes = list(mistakes)
        message = self.mistakes[0]
        if heading or len(self.mistakes) > 1:
            count = f"{len(self.mistakes)} mistake{'s' if len(self.mistakes) > 1 else ''}"
            lines = [f"{count} in {heading}:" if heading else f"{count}:", *self.mistakes]
            message = "\n  - ".join(lines)
        super().__init__(message)


class NotFinite(UserError):
    """Raised on a non-finite loss; the weights in memory are not saved."""

    common = True


class LeftOut(UserError):
    """Raised after damaged files were skipped and all others processed."""

    status = 1


class Interrupted(SystemExit):
    """Raised by Ctrl-C and other signals; Lightning would turn a KeyboardInterrupt into exit status 1."""


def exit_on_signals() -> None:
    """Makes Ctrl-C, SIGTERM and SIGUSR1 (SLURM's warning) raise `Interrupted`, status 128 + signal."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, _interrupt)


def _interrupt(signum: int, _frame: Any) -> NoReturn:
    raise Interrupted(128 + signum)


def stdout_is_lost() -> bool:
    """Whether standard output cannot be written; Python's flush at exit then goes nowhere."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def listed(heading: str, lines: Sequence[str]) -> str:
    """A heading followed by the first `SHOWN` lines."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([f"{heading}:", *(f"  - {line}" for line in [*lines[:SHOWN], *more])])


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def closest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' with the most similar key; '' if none is similar."""
    best = max(known, key=lambda key: _likeness(word, key), default="")
    return f" Did you mean {best}?" if _likeness(word, best) >= SIMILAR else ""


def _likeness(word: str, key: str) -> float:
    """From 0 to 1: by the letters or words of the names, and slightly by their sections."""
    (section, _, name), (other, _, known) = word.rpartition("."), key.rpartition(".")
    letters = SequenceMatcher(None, name, known).ratio()
    parts, known_parts = set(name.split("_")), set(known.split("_"))
    shared = max(map(len, parts & known_parts), default=0) > 3  # patch, dino_patch_size
    initials = len(name.split("_")) > 1 and known == "".join(part[:1] for part in name.split("_"))  # lr
    return 0.9 * max(letters, 0.8 * shared, initials) + 0.1 * SequenceMatcher(None, section, other).ratio()
