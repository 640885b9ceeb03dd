"""Where a step stands in a run: its epoch, whether a validation follows it, and when a run saves itself."""

from __future__ import annotations

import re


def checkpoint_interval(every: str | None) -> tuple[int | None, float | None]:
    """`train.checkpoint_every` as (steps, seconds), of which at most one is not None.

    Raises:
        ValueError: it is neither; tells what it must be.
    """
    if every is None:
        return None, None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(m|min|minutes?)?", str(every).strip())
    if found is None or float(found[1]) == 0 or not (found[2] or found[1].isdigit()):
        raise ValueError('must be a number of steps, such as 500, or of minutes, such as "15 min"')
    return (None, 60 * float(found[1])) if found[2] else (int(found[1]), None)
