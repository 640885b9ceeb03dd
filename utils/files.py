"""Writing result files: whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from utils.errors import UserError


def write_json(path: Path, content: Any) -> None:
    """Standard JSON (NaN as null), written to a temporary name and renamed."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(
        json.dumps(_standard(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    os.replace(temporary, path)


def _standard(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _standard(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_standard(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_folder(path: Path) -> Path:
    """The folder, made if need be.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another output_dir") from None
    return path


def move_aside(path: Path) -> Path | None:
    """Renames an existing folder to the first free <name>.1, <name>.2, ...; returns where it went."""
    if not path.exists() or not any(path.iterdir()):
        return None
    number = 1
    while (there := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(there)
    return there
