"""Downloads files over HTTP, with resume and retries, and unpacks zip archives."""

from __future__ import annotations

import os
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from utils.errors import UserError, first_line
from utils.files import sha256_of

CHUNK = 1 << 18  # bytes
LONGEST_WAIT = 120.0  # seconds between two tries
PROGRESS = 1 << 20  # bytes after which failed tries are counted from the start again
SLOWEST = 1000  # bytes per second; a slower connection is closed
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)  # raised by zipfile


class DownloadError(UserError):
    """No address delivered the file."""


class _Refused(Exception):
    """The address does not have the file; another try is pointless."""


class _Failed(Exception):
    """A try failed; the next one may succeed."""

    def __init__(self, reason: str, retry_after: str = "") -> None:
        super().__init__(reason)
        self.retry_after = float(retry_after) if retry_after.isdecimal() else None  # seconds


@dataclass(frozen=True)
class _Part:
    """A partial file, <name>.part, and what is known about the complete one."""

    path: Path
    sha256: str | None
    total: int | None

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def identified(self) -> bool:
        """Whether bytes from different addresses can be combined."""
        return self.sha256 is not None or self.total is not None

    @property
    def etag(self) -> Path:
        """The file that keeps the server's validator for If-Range."""
        return self.path.with_name(f"{self.path.name}.etag")

    @property
    def validator(self) -> str:
        return self.etag.read_text() if self.etag.exists() else ""

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.etag.unlink(missing_ok=True)


def download(
    urls: Sequence[str],
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    tries: int = 5,
    timeout: float = 30.0,
    backoff: float = 1.0,
) -> None:
    """Downloads a file from the first address that delivers it.

    The file grows as <name>.part and is renamed once it is complete. The next call resumes a partial file:
    from any address if `sha256` or `size` is known, otherwise only if the server confirms by If-Range that
    the file is unchanged.

    Args:
        urls: tried in this order.
        path: where the file goes; its folder must exist.
        sha256: digest that the file on disk must have.
        size: exact length in bytes.
        tries: failed tries in a row before the next address is used.
        timeout: seconds without data before a connection counts as failed.
        backoff: seconds before the second try; doubled with each further one.

    Raises:
        DownloadError: no address delivered the file; has one line per address.
    """
    reasons = []
    part = _Part(path.with_name(f"{path.name}.part"), sha256, size)
    for url in urls:
        try:
            _download_from(url, part, tries=tries, timeout=timeout, backoff=backoff)
        except _Refused as error:
            reasons.append(f"{url}: {error}")
            continue
        os.replace(part.path, path)
        part.etag.unlink(missing_ok=True)
        return
    raise DownloadError(reasons, f"downloading {path.name}")


def _download_from(url: str, part: _Part, *, tries: int, timeout: float, backoff: float) -> None:
    """Tries one address until the partial file is complete and has the right digest."""
    failures, resumed = 0, part.size > 0
    while True:
        before = part.size
        try:
            if part.total is None or part.size != part.total:
                _receive(url, part, timeout=timeout)
        except _Failed as error:
            failures = 1 if part.size - before >= PROGRESS else failures + 1
            if failures >= tries:
                raise _Refused(f"{error}; gave up after {tries} tries") from None
            wait = min(error.retry_after or backoff * 2 ** (failures - 1), LONGEST_WAIT)
            print(f"{url}: {error}; next try in {wait:g} s", flush=True)
            time.sleep(wait)
            continue
        if part.sha256 is None or (found := sha256_of(part.path)) == part.sha256:
            return
        part.remove()
        if not resumed:
            raise _Refused(f"its SHA-256 is {found}, must be {part.sha256}")
        resumed = False  # the first bytes may be another address's fault: start again once
        print(f"{url}: wrong SHA-256; downloading the file again from the start", flush=True)


def _receive(url: str, part: _Part, *, timeout: float) -> None:
    """One request: the rest of the file, or all of it if the server cannot resume or the file changed."""
    headers = {"Accept-Encoding": "identity"}
    if part.size and (part.identified or part.validator):
        headers["Range"] = f"bytes={part.size}-"
        if not part.identified:
            headers["If-Range"] = part.validator
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
            total = _begin(response, part)
            if total is None or part.size < total:
                _copy(response, part, total, timeout=timeout)
    except (requests.exceptions.SSLError, ValueError) as error:  # ValueError: not an address
        raise _Refused(first_line(error)) from None
    except (requests.RequestException, HTTPError) as error:
        raise _Failed(f"connection failed ({connection_error(error)})") from None
    if total is not None and part.size < total:
        raise _Failed(f"connection closed after {part.size:,} of {total:,} bytes")


def _begin(response: requests.Response, part: _Part) -> int | None:
    """Checks status and headers; afterwards the partial file ends where the body starts.

    Returns:
        The length of the complete file, None if the server does not say.
    """
    status, headers = response.status_code, response.headers
    if status == 429 or status >= 500:
        raise _Failed(f"HTTP {status} {response.reason}", headers.get("Retry-After", ""))
    if status not in (200, 206, 416):
        raise _Refused(f"HTTP {status} {response.reason}")
    span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", headers.get("Content-Range", ""))
    if status == 416 and span and int(span[2]) == part.size:
        return part.size  # complete already, but not renamed
    etag = headers.get("ETag", "")
    validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")  # weak ones do not do
    if status == 200:
        total = int(headers["Content-Length"]) if "Content-Length" in headers else None
        _check(total, part, content_type=headers.get("Content-Type", ""))
        part.remove()
        if validator and not part.identified:
            part.etag.write_text(validator)
        return total
    if span and span[1] == str(part.size) and (part.identified or validator == part.validator):
        _check(int(span[2]), part, content_type=headers.get("Content-Type", ""))
        return int(span[2])
    part.remove()
    raise _Failed("the file on the server changed")


def _check(total: int | None, part: _Part, *, content_type: str) -> None:
    """Refuses a body that cannot be the file."""
    if "text/html" in content_type:
        raise _Refused("sends a web page instead of the file")
    if total is None:
        if not part.identified:
            raise _Refused("does not say how long the file is, so that a cut would go unnoticed")
        return
    if part.total not in (None, total):
        raise _Refused(f"has {total:,} bytes, must have {part.total:,}")
    free = shutil.disk_usage(part.path.parent).free
    if total - part.size > free:
        raise _Refused(f"the file has {readable_size(total)}, {readable_size(free)} are free on the disk")


def _copy(response: requests.Response, part: _Part, total: int | None, *, timeout: float) -> None:
    since, received = time.monotonic(), 0
    with (
        part.path.open("ab") as file,
        tqdm(
            total=total, initial=part.size, desc=part.path.stem, unit="B", unit_scale=True, disable=None
        ) as bar,
    ):
        while chunk := response.raw.read1(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
            received += len(chunk)
            if time.monotonic() - since > timeout:
                if received < SLOWEST * timeout:
                    raise _Failed(f"too slow ({received:,} bytes in {timeout:g} s)")
                since, received = time.monotonic(), 0


def connection_error(error: Exception) -> str:
    """The cause of an error of requests, without the text that wraps it."""
    cause = error.args[0] if error.args else error
    cause = getattr(cause, "reason", cause)
    return first_line(cause) if isinstance(cause, Exception) else str(cause)


def extract(archive: Path, folder: Path, wanted: Sequence[str]) -> None:
    """Unpacks folders and files of a zip archive; those that exist are skipped.

    Members go into <folder>/.<archive>.unpacking and are moved when all are complete and their CRCs right;
    the next call resumes an interrupted one. Nothing is written outside `folder`.

    Args:
        archive: a zip file.
        folder: created if necessary.
        wanted: paths such as "images/train2017", at the top of the archive or one folder down.

    Raises:
        UserError: not a zip file, a damaged one, one that lacks something wanted, or the disk is too small.
    """
    missing = [name for name in wanted if not (folder / name).exists()]
    staging = folder / f".{archive.name}.unpacking"
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if _is_wanted(member, missing)]
            needed, free = sum(member.file_size for member in members), shutil.disk_usage(archive.parent).free
            if needed > free:
                sizes = f"{readable_size(needed)}, {readable_size(free)} are free on the disk"
                raise UserError(f"{archive}: unpacks to {sizes}")
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit="file", disable=None):
                target = staging / member.filename
                if not target.exists() or target.stat().st_size != member.file_size:
                    opened.extract(member, staging)
    except DAMAGED as error:
        shutil.rmtree(staging, ignore_errors=True)
        reason = f"damaged, or not a zip archive ({first_line(error)})"
        raise UserError(f"{archive}: {reason}; delete it and run the same command again") from None
    for name in missing:
        found = next((path for path in (staging / name, *staging.glob(f"*/{name}")) if path.exists()), None)
        if found is None:
            raise UserError(f"{archive}: does not contain {name}; delete it and run the same command again")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(found, folder / name)
    shutil.rmtree(staging, ignore_errors=True)


def _is_wanted(member: zipfile.ZipInfo, wanted: Sequence[str]) -> bool:
    parts = PurePosixPath(member.filename).parts
    prefixes = [PurePosixPath(name).parts for name in wanted]
    found = any(parts[at : at + len(prefix)] == prefix for prefix in prefixes for at in (0, 1))
    return found and ".." not in parts and not member.is_dir()


def readable_size(size: float) -> str:
    """A number of bytes as "1.50GB"."""
    return tqdm.format_sizeof(size, "B")
