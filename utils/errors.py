"""The exception for mistakes that a user can fix, and helpers for its messages."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

SHOWN = 20  # lines of a long list in a message


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


def listed(heading: str, lines: Sequence[str]) -> str:
    """A heading followed by the first `SHOWN` lines."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([f"{heading}:", *(f"  - {line}" for line in [*lines[:SHOWN], *more])])


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def closest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' with the most similar key, full or without its section; '' if none is close."""
    full = {key: key for key in known}
    by_name = {key.rsplit(".", 1)[-1]: key for key in full} | full
    queries = (word, word.rsplit(".", 1)[-1])
    found = [name for query in queries for name in get_close_matches(query, by_name, n=1, cutoff=0.75)]
    return f" Did you mean {by_name[found[0]]}?" if found else ""
