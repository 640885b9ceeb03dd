"""Randomness as a function of (seed, purpose, step or index), independent of any global state.

Workers, prefetching, resuming and the number of ranks therefore cannot change what is drawn.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

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


def seed_globally(seed: int, *place: str | int) -> None:
    """Seeds torch (all devices), NumPy and Python, so that a user's own loss may draw from them."""
    drawn = derived_seed(seed, *place)
    torch.manual_seed(drawn)
    np.random.seed(drawn % 2**32)
    random.seed(drawn)
