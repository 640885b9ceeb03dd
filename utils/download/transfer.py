"""Fetching a file over HTTP: resumed where it was cut, tried again with growing waits, from many addresses.

The file grows as <name>.part beside <name>.part.json, which says what it is a part of, until it is whole.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from utils.download.headers import content_length, content_range, retry_after
from utils.download.partial import Part, Version
from utils.download.space import require_space
from utils.errors import UserError, first_line

CHUNK = 1 << 18
HEADERS = {"User-Agent": "ppap", "Accept-Encoding": "identity"}
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Patience:
    """How long to go on with one address.

    Attributes:
        tries: failures in a row before the next address; a try that brought `worthwhile` bytes starts anew.
        timeout: seconds without a byte before a connection counts as dead.
        first_wait, longest_wait: seconds; the wait doubles from one to the other.
        worthwhile: bytes.
        sleep: what waits.
    """

    tries: int = 6
    timeout: float = 30.0
    first_wait: float = 1.0
    longest_wait: float = 120.0
    worthwhile: int = 1 << 20
    sleep: Callable[[float], None] = time.sleep

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.first_wait * 2 ** (failures - 1), self.longest_wait)


@dataclass(frozen=True)
class Wanted:
    """What is known of a file before it is fetched; None: not known.

    Attributes:
        begins: its first bytes.
        size: bytes, exactly.
        sha256: of its content.
    """

    begins: bytes = b""
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Fetched:
    """A file that was fetched, as it goes into the record."""

    address: str
    size: int
    sha256: str
    etag: str | None
    last_modified: str | None
    date: str


class FetchError(UserError):
    """No address gave the file."""


class _Refusal(Exception):
    """An address does not have the file; asking again is of no use."""


class _Interruption(Exception):
    """A try failed; the next one may not. `wait`: seconds the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def fetch(addresses: Sequence[str], path: Path, *, wanted: Wanted, patience: Patience) -> Fetched:
    """Fetches a file from the first address that gives it.

    Raises:
        FetchError: none does; one line an address.
        UserError: the disk is full or cannot be written.
    """
    reasons: list[str] = []
    for number, address in enumerate(addresses, start=1):
        part = Part(path)
        try:
            version = _persist(address, part, wanted=wanted, patience=patience)
        except _Refusal as error:
            reasons.append(f"{address}: {error}")
            if number < len(addresses):
                print(f"{path.name}: {reasons[-1]}; going on with {addresses[number]}", flush=True)
            continue
        digest = part.finish(path)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Fetched(address, version.size, digest, version.etag, version.last_modified, now)
    raise FetchError(reasons, f"the addresses of {path.name}")


def size_of(address: str, *, timeout: float) -> int | None:
    """Bytes at an address, or None if it does not say."""
    try:
        with urlopen(Request(address, headers=HEADERS, method="HEAD"), timeout=timeout) as response:
            return content_length(response.headers)
    except (OSError, HTTPException, ValueError):
        return None


def _persist(address: str, part: Part, *, wanted: Wanted, patience: Patience) -> Version:
    """Tries until the part is whole; says which version it is."""
    failures, furthest = 0, part.size
    while True:
        try:
            with part:
                version = _receive(address, part, wanted=wanted, patience=patience)
            if wanted.sha256 not in (None, part.sha256):
                found = part.sha256
                part.clear()
                raise _Refusal(f"its SHA-256 is {found}, must be {wanted.sha256}")
            return version
        except _Interruption as error:
            gained = part.size - furthest
            furthest = max(furthest, part.size)
            failures = 1 if gained >= patience.worthwhile else failures + 1
            wait = patience.wait(failures) if error.wait is None else error.wait
            if wait > patience.longest_wait:
                raise _Refusal(f"{error}; asks to wait {wait:.0f} s") from None
            if failures >= patience.tries:
                raise _Refusal(f"{error}; given up after {failures} tries") from None
            print(f"{part.name}: {error}; trying again in {wait:g} s", flush=True)
            patience.sleep(wait)


def _receive(address: str, part: Part, *, wanted: Wanted, patience: Patience) -> Version:
    """One try: the rest of the part, or all of it where the server cannot resume or the file changed."""
    if part.version is not None and part.version.address == address and part.size == part.version.size:
        return part.version  # stopped between the last byte and the rename
    try:
        with _open(address, part, timeout=patience.timeout) as response:
            version = _begin(response, address, part, wanted=wanted)
            require_space(part.path.parent, version.size - part.size, f"the rest of {part.name}")
            _copy(response, part, version, begins=wanted.begins)
    except (OSError, HTTPException) as error:  # of the connection: the part raises UserErrors
        raise _Interruption(f"connection failed ({_words(error)})") from None
    if part.size < version.size:
        raise _Interruption(f"cut after {part.size:,} of {version.size:,} bytes")
    return version


def _open(address: str, part: Part, *, timeout: float) -> HTTPResponse:
    request = Request(address, headers=HEADERS)
    if part.size and part.version is not None and part.version.address == address:
        request.add_header("Range", f"bytes={part.size}-")
        if part.version.validator:
            request.add_header("If-Range", part.version.validator)
    try:
        return urlopen(request, timeout=timeout)
    except HTTPError as error:
        error.close()
        if error.code == 416:
            part.clear()
            raise _Interruption("has become shorter than what is here; starting anew", 0.0) from None
        reason = f"answers {error.code} {error.reason}"
        if error.code in TEMPORARY:
            raise _Interruption(reason, retry_after(error.headers)) from None
        raise _Refusal(reason) from None
    except URLError as error:
        hopeless = isinstance(error.reason, ssl.SSLCertVerificationError) or (
            isinstance(error.reason, socket.gaierror) and error.reason.errno == socket.EAI_NONAME
        )
        if hopeless:
            raise _Refusal(_words(error)) from None
        raise
    except ValueError as error:  # an address that is none
        raise _Refusal(first_line(error)) from None


def _begin(response: HTTPResponse, address: str, part: Part, *, wanted: Wanted) -> Version:
    """Reads the headers; afterwards the part ends where the body starts."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _Refusal(f"sends it encoded as {response.headers['Content-Encoding']}, which was not asked for")
    start, total = 0, content_length(response.headers)
    if response.status == 206:
        found = content_range(response.headers)
        if found is None:
            part.clear()
            raise _Interruption("answers with a part without saying which; starting anew")
        if total not in (None, found.end - found.start):
            raise _Interruption(f"Content-Length is {total}, its range has {found.end - found.start} bytes")
        start, total = found.start, found.total
    if not total:
        raise _Refusal("is empty, or does not say how long it is, so that a cut would go unnoticed")
    if wanted.size not in (None, total):
        raise _Refusal(f"has {total:,} bytes, must have {wanted.size:,}")
    headers = response.headers
    version = Version(address, total, headers.get("ETag"), headers.get("Last-Modified"))
    if response.status == 206 and (start != part.size or not version.agrees(part.version)):
        part.clear()
        raise _Interruption("the file changed on the server; starting anew", 0.0)
    if response.status != 206:
        if part.size:
            print(f"{part.name}: it changed, or its server cannot resume; starting anew", flush=True)
        part.start(version)
    return version


def _copy(response: HTTPResponse, part: Part, version: Version, *, begins: bytes) -> None:
    """The body into the part, never more than the version has."""
    bar = tqdm(
        total=version.size,
        initial=part.size,
        unit="B",
        unit_scale=True,
        desc=part.name,
        disable=None,  # where nobody looks
    )
    with bar:
        while part.size < version.size and (chunk := response.read1(min(CHUNK, version.size - part.size))):
            if part.size == 0 and not chunk.startswith(begins[: len(chunk)]):
                part.clear()
                raise _Refusal(f"sends something else: begins with {chunk[:16]!r}, must with {begins!r}")
            part.write(chunk)
            bar.update(len(chunk))


def _words(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    return first_line(reason if isinstance(reason, BaseException) else error)
