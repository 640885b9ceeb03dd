"""The one exception for mistakes a user can mend, and how its message is put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

SHOWN = 20  # lines of a long list that a message has


class UserError(Exception):
    """A mistake outside the program: an option, a file, a data set. Shown without a traceback.

    Args:
        mistakes: one line each: the key or file, its value, what is allowed and what to do.
        heading: what the mistakes were found in.

    Attributes:
        status: the program's exit status.
        label: what the message begins with.
        common: whether all processes of a run raise it together.
    """

    status = 2
    label = "error"
    common = False

    def __init__(self, mistakes: str | Iterable[str], heading: str = "") -> None:
        self.mistakes = [_own_words(mistakes)] if isinstance(mistakes, str) else list(mistakes)
        self.heading = heading
        super().__init__(str(self))

    def __str__(self) -> str:
        if not self.heading and len(self.mistakes) == 1:
            return self.mistakes[0]
        count = f"{len(self.mistakes)} mistake{'s' if len(self.mistakes) > 1 else ''}"
        head = f"{count} in {self.heading}:" if self.heading else f"{count}:"
        return "\n".join([head, *(f"  - {line}" for line in self.mistakes)])


class NotFinite(UserError):
    """A loss that is no number: what is in memory is not worth keeping."""

    common = True


class LeftOut(UserError):
    """Damaged files were passed over and all else was done: exit status 1."""

    status = 1


class Interrupted(UserError):
    """Ctrl-C, and what stays of what was done; the exit status is that of shells."""

    status = 130
    label = "interrupted"


def _own_words(message: str) -> str:
    """A message as it was raised: torch raises a worker's exception anew with its traceback as the text."""
    return message.rsplit(f"{UserError.__module__}.UserError: ", 1)[-1].strip()


def listed(heading: str, lines: Sequence[str]) -> str:
    """A heading, the first of many lines below it, and how many more there are."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([f"{heading}:", *(f"  - {line}" for line in [*lines[:SHOWN], *more])])


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def closest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known word nearest to `word`, or nothing.

    A dotted key is also compared by its last part, so that a key in the wrong section is found.
    """
    known = list(known)
    found = get_close_matches(word, known, n=1, cutoff=0.75)
    if not found:
        by_tail = {key.rsplit(".", 1)[-1]: key for key in known}
        tails = get_close_matches(word.rsplit(".", 1)[-1], by_tail, n=1, cutoff=0.75)
        found = [by_tail[tail] for tail in tails]
    return f" Did you mean {found[0]}?" if found else ""
