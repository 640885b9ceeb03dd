"""download.json: where each file came from, and what was unpacked to where."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from utils.download.archives import Unpacked
from utils.download.layout import file_count
from utils.download.sources import Archive
from utils.download.transfer import Fetched
from utils.errors import UserError
from utils.files import read_json_object, write_json

NAME = "download.json"


class Ledger:
    """The record of a folder; written whole after every change.

    Args:
        root: the folder of the data set.

    Raises:
        UserError: the record is there but damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / NAME
        content = read_json_object(self.path) if self.path.exists() else {}
        self._files: dict[str, Any] = content.get("files", {})
        self._unpacked: dict[str, Any] = content.get("unpacked", {})
        if not (isinstance(self._files, dict) and isinstance(self._unpacked, dict)):
            raise UserError(f"{self.path}: files and unpacked must be objects; delete it and run again")

    def add_file(self, name: str, fetched: Fetched) -> None:
        """A file was fetched."""
        self._files[name] = asdict(fetched)
        self._write()

    def add_unpacked(self, archive: Archive, unpacked: Unpacked) -> None:
        """An archive was unpacked."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._unpacked[archive.name] = {"into": archive.into, **asdict(unpacked), "date": now}
        self._write()

    def has_unpacked(self, archive: Archive) -> bool:
        """Whether an archive was unpacked and no folder that it went to has fewer files since."""
        entry = self._unpacked.get(archive.name)
        if not isinstance(entry, dict) or not isinstance(entry.get("folders"), dict):
            return False
        base = self.root / archive.into
        return all(file_count(base / folder) >= count for folder, count in entry["folders"].items())

    def _write(self) -> None:
        write_json(self.path, {"files": self._files, "unpacked": self._unpacked})
