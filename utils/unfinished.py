"""Folders in the making: gone when their maker fails, and found by the next one where it was killed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nothing is swept there
    fcntl = None

LOCK = "lock"  # held by whoever makes the folder; the kernel lets go of it however the process ends


@contextmanager
def unfinished_folder(there: Path) -> Iterator[Path]:
    """A folder <name>.<random> beside `there`, to be filled and then renamed; removed at the end if not.

    Raises:
        OSError: it cannot be made.
    """
    part = Path(tempfile.mkdtemp(prefix=f"{there.name}.", dir=there.parent))
    with ExitStack() as held:
        held.callback(shutil.rmtree, part, ignore_errors=True)
        if fcntl is not None:
            unheld = part / f"{LOCK}.new"
            if _locked(held.enter_context(unheld.open("wb"))):
                unheld.rename(part / LOCK)  # under the name that is looked for it is never without a holder
            else:
                unheld.unlink()
        yield part
        (there / LOCK).unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> list[Path]:
    """Removes what `unfinished_folder` left in a folder where its process was killed; returns what it was."""
    removed = []
    for lock in sorted(folder.glob(f"*.*/{LOCK}")) if fcntl is not None else ():
        with suppress(OSError), lock.open("rb") as file:  # another's, or gone by now
            if _locked(file):
                shutil.rmtree(lock.parent)
                removed.append(lock.parent)
    return removed


def _locked(file: IO[bytes]) -> bool:
    """Takes the lock on a file, unless another holds it or its file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
