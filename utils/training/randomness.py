"""Randomness as a function of (seed, purpose, place): made afresh wherever it is needed.

So workers, prefetching, a resumed run or several ranks cannot change what is drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derived_seed(seed: int, *place: str | int) -> int:
    """A 63-bit seed from the run's seed and a place such as ("anchors", step): SHA-256 of both."""
    digest = hashlib.sha256("/".join(map(str, (seed, *place))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *place: str | int) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, *place))


@contextmanager
def seeded(seed: int, *place: str | int) -> Iterator[None]:
    """Seeds torch's global CPU generator inside the block, for library initialisers, and restores it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, *place))
        yield


def random_states() -> dict[str, Any]:
    """States of the global generators of Python, NumPy and torch, in what `torch.load` reads as plain."""
    kind, keys, *further = np.random.get_state()
    return {
        "python": list(random.getstate()),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *further],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Puts the global generators where `random_states` found them."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *further = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *further))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
