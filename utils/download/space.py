"""Room on the disk, and sizes in words."""

from __future__ import annotations

import shutil
from pathlib import Path

from utils.errors import UserError


def require_space(folder: Path, need: int, what: str) -> None:
    """Raises a UserError unless `need` bytes are free where `folder` is, or where it will be."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{folder}: {what} needs {readable(need)}, {readable(free)} are free; free some space or choose "
            "another folder"
        )


def readable(size: float) -> str:
    """Bytes in words: 1.5 GB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
