"""A file that is being fetched, and what it is a part of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from utils.errors import UserError
from utils.files import read_json_object, write_json

CHUNK = 1 << 20


@dataclass(frozen=True)
class Version:
    """A file as a server describes it.

    Attributes:
        address: where it is.
        size: bytes.
        etag, last_modified: its headers, None where there are none.
    """

    address: str
    size: int
    etag: str | None
    last_modified: str | None

    @property
    def validator(self) -> str | None:
        """What If-Range takes: a strong ETag, or a date."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def agrees(self, other: Version | None) -> bool:
        """Whether nothing that both say differs."""
        if other is None or self.size != other.size:
            return False
        pairs = ((self.etag, other.etag), (self.last_modified, other.last_modified))
        return all(None in pair or pair[0] == pair[1] for pair in pairs)


class Part:
    """<name>.part and <name>.part.json; a context manager that keeps the file open.

    Args:
        path: the file that it becomes.

    Attributes:
        name: of that file.
        size: bytes that are there.
        version: what they are a part of, None where there are none.

    Raises:
        UserError: from every method, if the disk is full or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.path = path.with_name(f"{path.name}.part")
        self.about = path.with_name(f"{path.name}.part.json")
        self.version, self.size = _recorded(self.about), 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        if self.version is not None and self.path.is_file():
            self.size = self.path.stat().st_size
            self._read()
        if self.version is None or self.size > self.version.size:
            self.clear()

    @property
    def sha256(self) -> str:
        """Of what is there."""
        return self._digest.hexdigest()

    def __enter__(self) -> Part:
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            with _writing(self.path):
                self._file.close()
            self._file = None
            if self.size == 0:
                self.clear()  # an address that gave nothing leaves nothing

    def start(self, version: Version) -> None:
        """Drops what is there and begins a version."""
        self.clear()
        with _writing(self.about):
            write_json(self.about, asdict(version))
        self.version = version

    def write(self, chunk: bytes) -> None:
        """Appends, inside the context."""
        assert self._file is not None
        with _writing(self.path):
            self._file.write(chunk)
            self._file.flush()  # what a kill leaves is what the next run goes on from
        self._digest.update(chunk)
        self.size += len(chunk)

    def clear(self) -> None:
        """Drops what is there."""
        with _writing(self.path):
            if self._file is not None:
                self._file.truncate(0)
            elif self.path.exists():
                self.path.unlink()
            self.about.unlink(missing_ok=True)
        self.size, self.version, self._digest = 0, None, hashlib.sha256()

    def finish(self, path: Path) -> str:
        """Gives the file its name, outside the context; returns its SHA-256."""
        with _writing(path):
            os.replace(self.path, path)
            self.about.unlink(missing_ok=True)
        return self.sha256

    def _read(self) -> None:
        with _writing(self.path), self.path.open("rb") as file:
            while chunk := file.read(CHUNK):
                self._digest.update(chunk)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an OSError of the disk into a UserError, so that it is not taken for one of the network."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); mend that or choose another folder"
        ) from None


def _recorded(path: Path) -> Version | None:
    """The version that a .part.json names, None if it is missing or damaged."""
    try:
        return Version(**read_json_object(path))
    except (UserError, TypeError):
        return None
