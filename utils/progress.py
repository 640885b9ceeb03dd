"""Progress bars of 80 columns; without a terminal, a line every 30 seconds."""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TextIO

from tqdm import tqdm

from utils.training.launch import is_rank_zero

COLUMNS = 80
LINE_SECONDS = 30.0  # between two lines if the output is a file


class Bar(tqdm):
    """tqdm for a terminal and for log files; shown by rank zero only."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        seconds = 0.1 if sys.stderr.isatty() else LINE_SECONDS
        defaults = {"ncols": COLUMNS, "mininterval": seconds, "maxinterval": seconds}
        super().__init__(*args, **defaults | {"disable": not is_rank_zero()} | arguments)

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Lines instead of one line that is overwritten, if the output is not a terminal."""

        def line(text: str) -> None:
            if text.strip():
                print(text.strip(), file=file, flush=True)

        return tqdm.status_printer(file) if file.isatty() else line

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self.disable:
            self.write(text) if sys.stderr.isatty() else print(text, flush=True)


@cache
def print_once(text: str) -> None:
    """Prints a message once per process: an evaluation reopens the data of the training."""
    print(text)


def duration(seconds: float) -> str:
    """A time such as "45 s", "3.2 min" or "5.1 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
