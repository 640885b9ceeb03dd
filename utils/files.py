"""Files of results: written whole or not at all, and found again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENS_FOLDER = "tokens"  # below output_dir, of the caches of all runs
CHECKPOINTS = ("best.ckpt", "best.pth", "ckpt.pth")  # in the order they are looked for


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: not readable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:  # the last: nested thousands deep
        raise UserError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold an object {{...}}, holds {type(content).__name__}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Standard JSON (NaN as null), whole or not at all."""
    write_text(path, json.dumps(_standard(content), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # an unfinished write names no file


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary name beside a file, which takes the file's place when the block ends well.

    Where it does not, nothing is left of the temporary file, and the old one is as it was.

    Args:
        path: of the file.
        sync: whether to wait for the disk, so that after a power cut either file is whole.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        yield temporary
        if sync:
            _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        if sync and os.name == "posix":  # elsewhere folders cannot be opened
            _sync(path.parent, os.O_RDONLY)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path, how: int) -> None:
    opened = os.open(path, how)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, a block at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _standard(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _standard(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_standard(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_folder(path: Path, *, named_by: str = "output_dir") -> Path:
    """The folder, made if need be.

    Args:
        path: of the folder.
        named_by: the option or flag that named it.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another {named_by}") from None
    return path


def move_aside(path: Path) -> Path | None:
    """Renames an existing folder to the first free <name>.1, <name>.2, ...; returns where it went."""
    try:
        if not path.exists() or not any(path.iterdir()):
            return None
        number = 1
        while (there := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(there)
    except OSError as error:
        raise UserError(f"{path}: cannot be moved aside ({error.strerror}); move or rename it") from None
    return there


def weights_file(name: str) -> Path:
    """A weights file: a path, or one below the project, as model/weights/demo.safetensors."""
    path = Path(name)
    return path if os.path.exists(path) or path.is_absolute() else REPOSITORY / path


def find_checkpoint(name: str, output_dir: str) -> Path:
    """A file; or a folder, or a run's folder below `output_dir`, with best.ckpt, best.pth or ckpt.pth.

    Raises:
        UserError: nothing is there; names the places.
    """
    if not name:
        raise UserError("no checkpoint is named: give --checkpoint a file, a folder or the name of a run")
    if os.path.isfile(name):  # unlike Path.is_file, no error where a name is too long
        return Path(name)
    places = [folder / file for folder in (Path(name), Path(output_dir) / name) for file in CHECKPOINTS]
    for place in places:
        if os.path.isfile(place):
            return place
    known = Path(output_dir) if os.path.isdir(output_dir) else None
    runs = sorted(
        {path.parent.name for file in CHECKPOINTS for path in known.glob(f"*/{file}")} if known else ()
    )
    there = f"runs in {output_dir}: {', '.join(runs)}" if runs else f"{output_dir} holds no run"
    raise UserError(f"checkpoint {name}: none of {', '.join(map(str, places))} is there; {there}")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock .<name>.lock beside `path`; if another process holds it, says which one and waits."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    holder = path.with_name(f".{path.name}.holder")  # not in the lock itself: some versions empty it
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        print(f"{path}: {who} is writing there; waiting until it ends", flush=True)
        held = lock.acquire()
    with held:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)
