"""Unpacking zip archives that are not trusted: nothing outside the folder, no links, no byte undeclared."""

from __future__ import annotations

import errno
import lzma
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile, ZipInfo

from tqdm import tqdm

from utils.download.space import require_space
from utils.errors import UserError, first_line

CHUNK = 1 << 20
DAMAGE = (BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)
ENCRYPTED = 0x1  # in a member's flag bits


@dataclass(frozen=True)
class Member:
    """A file in an archive and where it goes, below the folder."""

    info: ZipInfo
    path: PurePosixPath


@dataclass(frozen=True)
class Unpacked:
    """What an archive was unpacked to.

    Attributes:
        folders: files that each folder below the target folder got.
        files, size: number and bytes of all.
        skipped: how many of them were there already, with the same size and CRC.
    """

    folders: dict[str, int]
    files: int
    size: int
    skipped: int


def bytes_to_unpack(archive: Path, folder: Path, *, wanted: tuple[str, ...]) -> int:
    """What `unpack` would need on the disk.

    Raises:
        UserError: no zip file, or a member that is refused.
    """
    with _opened(archive) as opened:
        return _missing(checked_members(archive, opened, wanted=wanted), folder)


def unpack(archive: Path, folder: Path, *, wanted: tuple[str, ...]) -> Unpacked:
    """Unpacks the wanted part of an archive; files that are there with size and CRC are left alone.

    Args:
        archive: a zip file.
        folder: made if need be.
        wanted: names of folders and files at the top of the archive or one folder down; () for everything.

    Raises:
        UserError: no zip file, a member that is refused or damaged, or too little space.
    """
    with _opened(archive) as opened:
        members = checked_members(archive, opened, wanted=wanted)
        require_space(folder, _missing(members, folder), f"what {archive.name} unpacks to")
        total, skipped = sum(member.info.file_size for member in members), 0
        bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"unpacking {archive.name}", disable=None)
        with bar:
            for member in members:
                if _is_complete(folder / member.path, member.info):
                    skipped += 1
                else:
                    _extract(opened, member, folder / member.path, archive=archive)
                bar.update(member.info.file_size)
    counts = Counter(str(member.path.parent) for member in members)
    return Unpacked(dict(counts), len(members), total, skipped)


def checked_members(archive: Path, opened: ZipFile, *, wanted: tuple[str, ...]) -> list[Member]:
    """The wanted files of an archive, once every name in it has been found harmless.

    Raises:
        UserError: it holds something that is refused, or nothing that is wanted.
    """
    mistakes = [f"{info.orig_filename!r}: {why}" for info in opened.infolist() if (why := _refused(info))]
    files = [info for info in opened.infolist() if not info.is_dir()]
    places = [(info, _place(info.filename, wanted)) for info in files]
    members = [Member(info, path) for info, path in places if path is not None]
    counts = Counter(member.path for member in members)
    mistakes += [f"'{path}': is in it {count} times" for path, count in counts.items() if count > 1]
    if mistakes:
        more = [f"... and {len(mistakes) - 8} more"] if len(mistakes) > 8 else []
        hint = "nothing was unpacked; such an archive is damaged or hostile: delete it, try another source"
        raise UserError([*mistakes[:8], *more, hint], str(archive))
    if not members:
        raise UserError(
            f"{archive}: holds none of {', '.join(wanted) or 'any file'}; delete it, it is another"
        )
    return members


def _refused(info: ZipInfo) -> str | None:
    """Why a member is not unpacked, or None."""
    name = info.orig_filename  # as it stands in the archive, before zipfile mends it
    kind = stat.S_IFMT(info.external_attr >> 16)
    if not name or "\0" in name or "\\" in name:
        return "an empty name, or one with a backslash or a zero byte"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    if ".." in name.split("/"):
        return "leads out of the folder"
    if kind == stat.S_IFLNK:
        return "a link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "neither a file nor a folder"
    return "is encrypted" if info.flag_bits & ENCRYPTED else None


def _place(name: str, wanted: tuple[str, ...]) -> PurePosixPath | None:
    """Where a member goes: from the wanted folder on, which may lie one folder down in the archive."""
    parts = PurePosixPath(name).parts
    if not wanted:
        return PurePosixPath(*parts)
    for depth in (0, 1):
        if parts[depth : depth + 1] and parts[depth] in wanted:
            return PurePosixPath(*parts[depth:])
    return None


def _missing(members: list[Member], folder: Path) -> int:
    """Bytes of the members that are not there."""
    return sum(
        member.info.file_size for member in members if not _has_size(folder / member.path, member.info)
    )


def _has_size(path: Path, info: ZipInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.file_size


def _is_complete(path: Path, info: ZipInfo) -> bool:
    if not _has_size(path, info):
        return False
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found = zlib.crc32(chunk, found)
    return found == info.CRC


def _extract(opened: ZipFile, member: Member, path: Path, *, archive: Path) -> None:
    """One member, under another name until it is whole and its CRC is right."""
    declared, written = member.info.file_size, 0
    temporary = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as sink, _blaming(archive, member), opened.open(member.info) as source:
            while chunk := source.read(CHUNK):
                written += len(chunk)
                if written > declared:
                    raise BadZipFile(f"is longer than the {declared:,} bytes that are declared")
                sink.write(chunk)
            if written < declared:
                raise BadZipFile(f"holds {written:,} bytes, {declared:,} are declared")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_of_the_disk(error: Exception) -> bool:
    """Whether the archive is not to blame: an offset before its start is an OSError too, but EINVAL."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


@contextmanager
def _blaming(archive: Path, member: Member) -> Iterator[None]:
    try:
        yield
    except (*DAMAGE, OSError) as error:
        if _is_of_the_disk(error):
            raise
        raise UserError(
            f"{archive}: {member.info.filename} is damaged ({first_line(error)}); delete {archive} and run "
            "the command again: it is fetched anew, what is unpacked stays"
        ) from None


@contextmanager
def _opened(archive: Path) -> Iterator[ZipFile]:
    try:
        opened = ZipFile(archive)
    except (*DAMAGE, OSError) as error:
        if _is_of_the_disk(error):
            raise
        raise UserError(
            f"{archive}: not a whole zip archive ({first_line(error)}); delete it, and it is fetched again"
        ) from None
    with opened:
        yield opened
