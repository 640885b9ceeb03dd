"""Checkpoint files of a run: written whole or not at all, and held against a digest when they are read.

The digest is the comment of the zip archive that `torch.save` writes, so that it travels with the file and
every reader of such archives goes on reading it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from utils.errors import UserError, first_line
from utils.files import replacing

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
NEWEST = "newest.ckpt"  # until last.ckpt has become previous.ckpt
MARK, HEX = b"sha256:", 64  # the comment: this and so many digits
PROGRESS = "progress"  # the entry of a checkpoint


@dataclass(frozen=True)
class Progress:
    """How far a run had come when a checkpoint was written.

    Attributes:
        step: the last that was trained, from 1; 0 before the first.
        validated: False where the validation that follows this step is still to be done.
        best: the largest sum of metrics so far.
        seconds: of training.
        wandb_id: of the run there, or None.
        random: states of the global random generators, as `random_states` gives them.
    """

    step: int = 0
    validated: bool = True
    best: float = float("-inf")
    seconds: float = 0.0
    wandb_id: str | None = None
    random: dict[str, Any] = field(default_factory=dict, repr=False)

    def as_entry(self) -> dict[str, Any]:
        """As plain containers."""
        return asdict(self)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint that a run can go on from."""

    path: Path
    progress: Progress


class WholeCheckpoints(TorchCheckpointIO):
    """What Lightning writes and reads checkpoints with."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        """Writes one, whole or not at all."""
        save_whole(checkpoint, Path(path))

    def load_checkpoint(self, path: str, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """Reads one that is not damaged."""
        check_digest(Path(path))
        return super().load_checkpoint(path, *arguments, **keywords)


def save_whole(content: dict[str, Any], path: Path) -> None:
    """`torch.save` under a temporary name, with a digest, synced to the disk and renamed.

    Raises:
        UserError: it cannot be written; what lay under the name is intact.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=True) as temporary:
            torch.save(content, temporary)
            _sign(temporary)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise UserError(
            f"{path}: cannot be written ({first_line(error)}; {free / 1e9:.1f} GB are free there); what was "
            "saved before is intact: free some space, or choose another folder"
        ) from None


def _sign(path: Path) -> None:
    """Makes the digest of an archive its comment."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        comment = MARK + _digest(file, size - 2).encode()
        file.seek(size - 2)  # the length of the comment, 0 so far, ends the archive
        file.write(struct.pack("<H", len(comment)) + comment)


def copy_whole(source: Path, path: Path) -> None:
    """Copies a file, whole or not at all.

    Raises:
        UserError: it cannot be written; what lay under the name is intact.
    """
    try:
        with replacing(path, sync=True) as temporary:
            shutil.copyfile(source, temporary)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); what lay there is intact") from None


def shift_names(folder: Path) -> None:
    """newest.ckpt becomes last.ckpt, and last.ckpt previous.ckpt: at any moment one of them is there."""
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    os.replace(folder / NEWEST, folder / LAST)


def check_digest(path: Path) -> None:
    """Holds a file against its digest; one that has none, as other programs write it, passes.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    length = len(MARK) + HEX
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - length))
            comment = file.read()
            if comment.startswith(MARK) and comment[len(MARK) :].decode("ascii", "replace") != _digest(
                file, size - length - 2
            ):
                raise UserError(f"{path}: damaged (its content is not that of its SHA-256)")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def refuse_bomb(path: Path) -> None:
    """torch stores without compression: a content larger than its file is none of torch's.

    Raises:
        ValueError: it is larger.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > path.stat().st_size:
            raise ValueError(f"its content of {size} bytes is larger than the file")


def _digest(file: Any, size: int) -> str:
    """SHA-256 of the first bytes of an open file."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, 2**20))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def newest_complete(folder: Path) -> Saved | None:
    """The checkpoint that has come furthest among those of a run that are whole; names those that are not.

    Ends a change of names that was cut short.
    """
    found = []
    if (folder / NEWEST).is_file():  # which has its name from `save_whole`, so it is whole
        shift_names(folder)
    for path in (folder / name for name in (LAST, PREVIOUS, BEST)):
        if not path.is_file():
            continue
        try:
            found.append(Saved(path, read_progress(path)))
        except UserError as error:
            print(f"{error}; the one before it is used")
    return max(found, key=lambda saved: (saved.progress.step, saved.progress.validated), default=None)


def read_progress(path: Path) -> Progress:
    """How far a run had come when it wrote a checkpoint.

    Raises:
        UserError: damaged, or not one that a run can go on from.
    """
    check_digest(path)
    try:
        refuse_bomb(path)
        progress = Progress(**torch.load(path, map_location="cpu", weights_only=True)[PROGRESS])
        if not (isinstance(progress.step, int) and isinstance(progress.best, float)):
            raise TypeError("its progress is not a run's")
        return progress
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(
            f"{path}: no checkpoint to go on from ({type(error).__name__}: {first_line(error)})"
        ) from None
