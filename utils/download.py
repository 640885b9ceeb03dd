"""Downloads files over HTTP, with resume and retries, and unpacks zip archives."""

import os
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import ConnectionError
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from utils.errors import UserError, first_line
from utils.files import sha256_of
from utils.progress import Bar

CHUNK = 1 << 16  # bytes
TRIES = 5  # failed requests in a row before the next address is used
TIMEOUT = 30.0  # seconds without data, or with data at less than LEAST_RATE, after which a request fails
LEAST_RATE = 1000  # bytes per second
BACKOFF = 1.0  # seconds before a request is repeated; doubled each time
BUSY = (429, 500, 502, 503, 504)  # HTTP status of requests that are repeated


class DownloadError(UserError):
    """No address delivered the file."""


def download(urls: Sequence[str], path: Path, *, sha256: str | None = None, size: int | None = None) -> None:
    """Downloads a file from the first address that delivers it.

    The file grows as <name>.part. The next call resumes an interrupted download, from any address if `sha256`
    or `size` (in bytes) is known, otherwise from the same one. A DownloadError has one line per address.
    """
    reasons = []
    retry = Retry(TRIES - 1, backoff_factor=BACKOFF, status_forcelist=BUSY, raise_on_status=False)
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        for url in urls:
            source = "" if sha256 or size else f".{zlib.crc32(url.encode()):08x}"
            part = path.with_name(f"{path.name}{source}.part")
            try:
                _fetch(session, url, part, sha256, size)
            except (requests.RequestException, HTTPError, DownloadError) as error:
                reasons.append(f"{url}: {first_line(error)}")
                continue
            os.replace(part, path)
            return
    raise DownloadError(reasons, f"downloading {path.name}")


def _fetch(session: requests.Session, url: str, part: Path, sha256: str | None, size: int | None) -> None:
    """Completes the partial file and checks its SHA-256."""
    failures = 0
    while (start := _length(part)) != size:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416 and start:  # the partial file is not shorter than the server's
                part.unlink()
                continue
            try:
                _copy(response, part, start if response.status_code == 206 else 0, size)
                break
            except (ConnectionError, HTTPError):  # connection lost or timed out
                failures = 0 if _length(part) - start >= CHUNK else failures + 1
                if failures == TRIES:
                    raise
    if sha256 is not None and (found := sha256_of(part)) != sha256:
        part.unlink()
        raise DownloadError(f"its SHA-256 is {found}, must be {sha256}")


def _copy(response: requests.Response, part: Path, start: int, size: int | None) -> None:
    """Writes the response body to the partial file, starting at byte `start`."""
    if not response.ok:
        raise DownloadError(f"HTTP {response.status_code} {response.reason}")
    if "text/html" in response.headers.get("Content-Type", ""):
        raise DownloadError("the server sent a web page instead of the file")
    length = response.headers.get("Content-Length")
    total = size if length is None else start + int(length)
    if size not in (None, total):
        raise DownloadError(f"has {total:,} bytes, must have {size:,}")
    if total is not None and total - start > (free := shutil.disk_usage(part.parent).free):
        raise DownloadError(f"has {total:,} bytes, but only {free:,} bytes are free in {part.parent}")
    bar = Bar(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True)
    with part.open("ab" if start else "wb") as file, bar:
        measured, since = file.tell(), time.monotonic()
        while chunk := response.raw.read1(CHUNK):  # what has arrived
            file.write(chunk)
            bar.update(len(chunk))
            if (seconds := time.monotonic() - since) > TIMEOUT:
                if file.tell() - measured < LEAST_RATE * seconds:
                    raise DownloadError(f"sends less than {LEAST_RATE:,} bytes per second")
                measured, since = file.tell(), time.monotonic()
        if total is not None and file.tell() < total:
            raise ConnectionError("the connection was lost")


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def extract(archive: Path, folder: Path, wanted: Sequence[str]) -> None:
    """Unpacks a zip archive into a folder; members that exist with the right size are skipped.

    `wanted` are folders and files such as "images/train2017", at the top of the archive or one folder down.
    """
    names = "|".join(map(re.escape, wanted))
    pattern = re.compile(rf"(?:(?!__MACOSX)[^/]+/)?((?:{names})(?:/(?!.*\.\./).*)?)")
    target = None
    try:
        with zipfile.ZipFile(archive) as opened:
            members = Bar(opened.infolist(), desc=f"unpacking {archive.name}", unit="file")
            for member in members:
                match = pattern.fullmatch(member.filename)
                if match is None or member.is_dir():
                    continue
                target, member.filename = folder / match[1], match[1]
                if not target.exists() or target.stat().st_size != member.file_size:
                    opened.extract(member, folder)
    except OSError as error:
        error.filename = error.filename or str(target or archive)  # a full disk has no name
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        if target is not None:
            target.unlink(missing_ok=True)
        reason = f"damaged, or not a zip archive ({first_line(error)})"
        raise UserError(f"{archive}: {reason}; delete it and what was unpacked, and run again") from None
    if missing := [name for name in wanted if not (folder / name).exists()]:
        raise UserError(f"{archive}: does not contain {', '.join(missing)}; delete it and run again")
