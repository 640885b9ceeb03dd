"""Arrays of numbers in MAT-files of versions 5 to 7, as MATLAB and scipy write them.

scipy's own reader crashes the process on some damaged files; this one looks at each size before it reads.
Format: MATLAB's "MAT-File Format", https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HEADER = 128  # bytes
COMPRESSED, MATRIX = 15, 14  # types of elements
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
CLASSES = dict(zip(range(6, 16), ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"), strict=True))
COMPLEX = 0x800  # among an array's flags
LARGEST = 2**28  # bytes that a compressed element may become


def read_array(path: Path, key: str) -> np.ndarray | None:
    """The array of numbers of that name, of any axes; None where there is none.

    Args:
        path: of a .mat file.
        key: name of the variable.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or damaged.
    """
    content = path.read_bytes()
    order = {b"IM": "<", b"MI": ">"}.get(content[HEADER - 2 : HEADER])
    if order is None:
        raise ValueError("not a MAT-file of version 5 to 7")
    for kind, body in _elements(content[HEADER:], order):
        if kind == COMPRESSED:
            kind, body = next(_elements(_inflated(body), order), (None, b""))
        found = _matrix(body, key, order) if kind == MATRIX else None
        if found is not None:
            return found
    return None


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of each element; all begin at multiples of 8 bytes but those after compressed ones."""
    place = 0
    while place + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, place)
        small = kind >> 16  # the size of an element that lies in its own tag
        start, size, kind = (place + 4, small, kind & 0xFFFF) if small else (place + 8, size, kind)
        end = start + size
        if end > (place + 8 if small else len(data)):
            raise ValueError("an element is longer than the file")
        yield kind, data[start:end]
        place = place + 8 if small else end + (-size % 8 if kind != COMPRESSED else 0)


def _inflated(body: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(body, LARGEST)
    except zlib.error as error:
        raise ValueError(f"a compressed element is damaged: {error}") from None
    if not inflater.eof:
        raise ValueError("a compressed element is cut short or too large")
    return data


def _matrix(body: bytes, key: str, order: str) -> np.ndarray | None:
    """The array in an element of that name; None where it has another name or does not hold real numbers."""
    parts = [part for _, part in zip(range(4), _elements(body, order), strict=False)]
    if len(parts) < 4 or parts[2][1] != key.encode():
        return None
    (_, flags), (_, dimensions), _, (kind, numbers) = parts
    shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions[: len(dimensions) // 4 * 4])
    described = struct.unpack_from(f"{order}I", flags)[0] if len(flags) >= 4 else 0
    if described & 0xFF not in CLASSES or described & COMPLEX or kind not in NUMBERS:
        return None
    stored = np.dtype(NUMBERS[kind]).newbyteorder(order)
    if not shape or min(shape) < 0 or math.prod(shape) * stored.itemsize != len(numbers):
        raise ValueError(f"{key} is said to be of shape {shape}, which its {len(numbers)} bytes do not hold")
    return np.frombuffer(numbers, stored).reshape(shape, order="F").astype(CLASSES[described & 0xFF])
