"""Atomic writes, JSON, folders, locks, and the lookup of checkpoints and weights."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENS_FOLDER = "tokens"  # below output_dir; shared by all runs
CHECKPOINTS = ("best.ckpt", "best.pth", "ckpt.pth", "last.ckpt")  # in this order


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file; a key that appears twice in an object is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f'"{key}" appears twice in one object; merge the two or remove one')
            found[key] = value
        return found

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes standard JSON (NaN and infinity as null) atomically."""
    standard = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_text(path, json.dumps(standard, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path that is not UTF-8


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary path that replaces `path` if the block succeeds; `sync` also survives a power failure."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk has no name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def make_folder(path: Path, *, named_by: str = "output_dir") -> Path:
    """Creates a folder if necessary; raises a UserError naming the option `named_by` if this fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another {named_by}") from None
    return path


def move_aside(path: Path) -> Path | None:
    """Renames a file or a folder that is not empty to the first free <name>.1, .2, ...; returns that path."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(target)


def printable(path: Path | str) -> str:
    """A path as text; bytes that are not UTF-8 are escaped."""
    return str(path).encode(errors="backslashreplace").decode()


def weights_file(name: str) -> Path:
    """Resolves a weights path, relative to the working folder or to the project."""
    return Path(name) if os.path.exists(name) else REPOSITORY / name


def find_checkpoints(name: str, output_dir: str) -> list[Path]:
    """Finds checkpoints: a file, or those of `CHECKPOINTS` in a folder or in a run below `output_dir`."""
    if not name:
        raise UserError("no checkpoint is named: give --checkpoint a file, a folder or the name of a run")
    folders = (Path(name), Path(output_dir, name))
    places = dict.fromkeys([*folders, *(folder / file for folder in folders for file in CHECKPOINTS)])
    if found := [place for place in places if os.path.isfile(place)]:  # False for a name that is too long
        return found
    runs = sorted({path.parent.name for file in CHECKPOINTS for path in Path(output_dir).glob(f"*/{file}")})
    known = f"runs in {output_dir}: {', '.join(runs[:20])}" if runs else f"{output_dir} contains no run"
    raise UserError(f"checkpoint {name}: none of {', '.join(map(str, places))} exists; {known}")


@contextmanager
def exclusive(path: Path, *, advice: str | None = None) -> Iterator[None]:
    """Holds the lock .<name>.lock beside `path` until the block or the process ends.

    Waits for another process that holds it, or, with `advice`, raises a UserError that ends with it.
    """
    lock = path.with_name(f".{path.name}.lock")
    holder = lock.with_suffix(".holder")  # where flock is missing, FileLock writes its own into the lock
    try:
        with FileLock(lock, timeout=-1 if advice is None else 0):
            holder.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
            yield
    except Timeout:
        user = (holder.exists() and holder.read_text(encoding="utf-8")) or "another process"
        raise UserError(f"{path} is in use by {user} (lock: {lock}); wait until it ends{advice}") from None
