"""What a server's headers say, None where they say nothing that makes sense."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timezone
from email.message import Message
from email.utils import parsedate_to_datetime


@dataclass(frozen=True)
class Range:
    """A part of a file: bytes `start` to `end` (exclusive) of `total`."""

    start: int
    end: int
    total: int


def content_length(headers: Message) -> int | None:
    """Bytes of the body."""
    found = headers.get("Content-Length", "")
    return int(found) if found.isdecimal() else None


def content_range(headers: Message) -> Range | None:
    """Which part of the file the body is."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
    return Range(int(found[1]), int(found[2]) + 1, int(found[3])) if found else None


def retry_after(headers: Message) -> float | None:
    """Seconds to wait: given as a number, or as a date."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without a zone
        return None
