"""Dense CRF refinement (Krähenbühl and Koltun, NIPS 2011) in a pool of processes that import no torch.

Both heads of an image share one lattice; the workers get logits on the patch grid and upsample them, so
that little crosses the pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.training.launch import cores
from utils.vision.upsampling import upsample

if TYPE_CHECKING:
    from torch import Tensor

ITERATIONS = 10
GAUSSIAN = {"sxy": 1, "compat": 3}
BILATERAL = {"sxy": 67, "srgb": 3, "compat": 4}
LEAST_PROBABILITY = 1e-5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h has them
NEVER = 1e6  # energy of a label that a head does not have


@dataclass(frozen=True)
class HeadLogits:
    """Logits of one head for one image; tensors on one device where `utils.vision.mean_field` refines.

    Attributes:
        logits: (K, h, w) float32 on the patch grid.
        divisor: (H, W) float32 that the upsampled logits are divided by, or None.
    """

    logits: np.ndarray | Tensor
    divisor: np.ndarray | Tensor | None = None

    def at(self, size: tuple[int, int]) -> np.ndarray:
        """(K, H, W) float32."""
        full = upsample(self.logits, size)
        return full if self.divisor is None else full / self.divisor


def crf_missing() -> str | None:
    """Why CRF refinement is not to be had, or None."""
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        return f"pydensecrf does not import ({error}); pip install pydensecrf2 needs a C++ compiler"
    return None


def refine(image: np.ndarray, heads: Sequence[HeadLogits]) -> list[np.ndarray]:
    """Mean-field inference on one image for each head, on one lattice.

    Args:
        image: (H, W, 3) uint8, RGB.
        heads: logits whose softmax is the unary term.

    Returns:
        For each head the marginals, (K, H, W) float32.
    """
    from pydensecrf.densecrf import DenseCRF2D

    height, width = image.shape[:2]
    labels = max(len(head.logits) for head in heads)
    crf = DenseCRF2D(width, height, labels)
    crf.addPairwiseGaussian(**GAUSSIAN)
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    crf.addPairwiseBilateral(
        sxy=BILATERAL["sxy"], srgb=BILATERAL["srgb"], rgbim=bgr, compat=BILATERAL["compat"]
    )
    marginals = []
    for head in heads:
        unary = np.full((labels, height * width), NEVER, dtype=np.float32)
        unary[: len(head.logits)] = unary_energy(head.at((height, width))).reshape(len(head.logits), -1)
        crf.setUnaryEnergy(unary)
        q = np.asarray(crf.inference(ITERATIONS), dtype=np.float32).reshape(labels, height, width)
        marginals.append(q[: len(head.logits)])
    return marginals


def unary_energy(logits: np.ndarray) -> np.ndarray:
    """-log of the softmax over the first axis, probabilities clipped at 1e-5; float32 of the same shape."""
    exponent = np.exp(logits - logits.max(axis=0))
    return -np.log(np.clip(exponent / exponent.sum(axis=0), LEAST_PROBABILITY, 1)).astype(np.float32)


def _predict(image: np.ndarray, heads: Sequence[HeadLogits]) -> list[np.ndarray]:
    return [marginal.argmax(axis=0).astype(np.int16) for marginal in refine(image, heads)]


def keep_freed_memory() -> None:
    """Has this process use again what it frees, where glibc would hand it back to the kernel.

    pydensecrf makes its tables anew in every iteration: mapping and clearing them was measured to take a
    fifth of its time.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        glibc = ctypes.CDLL("libc.so.6")
        if any(
            glibc.mallopt(M_MMAP_THRESHOLD, size) for size in (2**30, 2**25)
        ):  # the most before glibc 2.35
            glibc.mallopt(M_TRIM_THRESHOLD, 2**30)


class CrfPool:
    """Processes that refine images while the network goes on; alive for a whole evaluation.

    Results come back in the order of submission, each with the tag it was given.

    Args:
        workers: number of processes; None is one per core this process may use.
    """

    on_device = False

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or cores()
        # spawn: a fork would copy torch's threads and, on a GPU, its context
        self._pool = ProcessPoolExecutor(
            self.workers, multiprocessing.get_context("spawn"), initializer=keep_freed_memory
        )
        self._pending: deque[tuple[Any, Future]] = deque()

    def submit(self, image: np.ndarray, heads: Sequence[HeadLogits], tag: Any) -> None:
        """Queues one image; see `refine` for the arguments."""
        self._pending.append((tag, self._pool.submit(_predict, image, heads)))

    def finished(self, *, wait_for_one: bool = False) -> Iterator[tuple[Any, list[np.ndarray]]]:
        """(tag, predictions (H, W) int16 per head) of what is done; blocks when too much is queued.

        Args:
            wait_for_one: whether to wait for the oldest image that is queued.
        """
        while self._pending:
            tag, future = self._pending[0]
            if not (wait_for_one or future.done() or len(self._pending) > 4 * self.workers):
                return
            wait_for_one = False
            self._pending.popleft()
            yield tag, future.result()

    def __len__(self) -> int:
        return len(self._pending)

    def __enter__(self) -> CrfPool:
        return self

    def __exit__(self, *_exception) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
