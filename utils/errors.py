"""The exception for mistakes that a user can fix, and the parts of its messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

SHOWN = 20  # lines of a long list in a message


class UserError(Exception):
    """A mistake in an option, a file or a data set; shown without a traceback.

    Args:
        mistakes: one line each: the key or file, its value, what is allowed and what to do.
        heading: what the mistakes were found in.
    """

    status = 2  # exit status of the program
    label = "error"  # first word of the message
    common = False  # whether all processes of a run raise it together

    def __init__(self, mistakes: str | Iterable[str], heading: str = "") -> None:
        if isinstance(mistakes, str):  # torch turns a worker's traceback into the text
            mistakes = [mistakes.rsplit(f"{UserError.__module__}.UserError: ", 1)[-1].strip()]
        self.mistakes = list(mistakes)
        self.heading = heading
        super().__init__(str(self))

    def __str__(self) -> str:
        if not self.heading and len(self.mistakes) == 1:
            return self.mistakes[0]
        head = f"{len(self.mistakes)} mistake{'s' if len(self.mistakes) > 1 else ''}"
        head += f" in {self.heading}:" if self.heading else ":"
        return "\n".join([head, *(f"  - {line}" for line in self.mistakes)])


class NotFinite(UserError):
    """Raised on a non-finite loss; the weights in memory are not saved."""

    common = True


class LeftOut(UserError):
    """Damaged files were skipped, everything else is done."""

    status = 1


def listed(heading: str, lines: Sequence[str]) -> str:
    """A heading and the first of many lines below it."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([f"{heading}:", *(f"  - {line}" for line in [*lines[:SHOWN], *more])])


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def closest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the most similar known word or last part of a dotted key, or nothing."""
    full = {key: key for key in known}
    by_name = {key.rsplit(".", 1)[-1]: key for key in full} | full
    for query in (word, word.rsplit(".", 1)[-1]):
        if found := get_close_matches(query, by_name, n=1, cutoff=0.75):
            return f" Did you mean {by_name[found[0]]}?"
    return ""
