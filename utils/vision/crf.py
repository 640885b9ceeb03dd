"""Dense CRF refinement (Krähenbühl and Koltun, NIPS 2011) with pydensecrf, in processes without torch.

All heads of an image share one lattice. The processes receive logits on the patch grid and upsample them.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax

from utils.errors import UserError
from utils.training.launch import cores, is_rank_zero
from utils.training.stopping import follow_main_process

if TYPE_CHECKING:
    from torch import Tensor

ITERATIONS = 10
GAUSSIAN = {"sxy": 1, "compat": 3}
BILATERAL = {"sxy": 67, "srgb": 3, "compat": 4}
LEAST_PROBABILITY = 1e-5
NEVER = 1e6  # energy of labels beyond a head's own


@dataclass(frozen=True)
class HeadLogits:
    """Logits of one head for one image: arrays for `CrfPool`, tensors for `MeanField`."""

    logits: np.ndarray | Tensor  # (K, h, w) float32 on the patch grid
    divisor: np.ndarray | Tensor | None = None  # (H, W) float32, divides the upsampled logits

    def at(self, size: tuple[int, int]) -> np.ndarray:
        """(K, H, W) float32."""
        full = upsample(self.logits, size)
        return full if self.divisor is None else full / self.divisor


def crf_missing() -> str | None:
    """Why pydensecrf is unavailable, or None."""
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        needs = "needs Python 3.12 or older and a C++ compiler"
        return f"pydensecrf does not import ({error}); pip install pydensecrf2 {needs}"
    return None


def resolve_backend(name: str) -> str:
    """The backend that `eval.crf_backend` selects: "auto" is pydensecrf if it imports, otherwise torch."""
    if name == "torch":
        return name
    if (missing := crf_missing()) is None:
        return "pydensecrf"
    if name == "pydensecrf":
        raise UserError(f"{missing}; or set eval.crf_backend=torch")
    if is_rank_zero():
        print(f"eval.crf_backend is auto: the CRF runs in torch, because {missing}")
    return "torch"


def refine(image: np.ndarray, heads: Sequence[HeadLogits]) -> list[np.ndarray]:
    """The marginals (K, H, W) float32 of each head of an image (H, W, 3) uint8, RGB."""
    from pydensecrf.densecrf import DenseCRF2D

    height, width = image.shape[:2]
    labels = max(len(head.logits) for head in heads)  # a narrower head is padded
    crf = DenseCRF2D(width, height, labels)
    crf.addPairwiseGaussian(**GAUSSIAN)
    crf.addPairwiseBilateral(**BILATERAL, rgbim=np.ascontiguousarray(image[:, :, ::-1]))  # BGR
    marginals = []
    for head in heads:
        probability = softmax(head.at((height, width)), axis=0).reshape(len(head.logits), -1)
        unary = np.full((labels, height * width), NEVER, dtype=np.float32)
        unary[: len(head.logits)] = -np.log(probability.clip(LEAST_PROBABILITY, 1))
        crf.setUnaryEnergy(unary)
        q = np.asarray(crf.inference(ITERATIONS), dtype=np.float32).reshape(labels, height, width)
        marginals.append(q[: len(head.logits)])
    return marginals


def upsample(channels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear upsampling (align_corners False) in NumPy, (C, h, w) float32 -> (C, H, W) float32."""
    top, bottom, weight = _neighbours(channels.shape[1], size[0])
    weight = weight[:, None]
    tall = channels[:, top] * (1 - weight) + channels[:, bottom] * weight  # (C, H, w)
    left, right, weight = _neighbours(channels.shape[2], size[1])
    return tall[:, :, left] * (1 - weight) + tall[:, :, right] * weight


def _neighbours(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two source positions of each target position and the weight of the second, (n_out,) each."""
    step = np.float32(n_in / n_out)
    source = (np.arange(n_out, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
    source = source.clip(min=0)
    low = np.minimum(source.astype(np.int64), n_in - 1)
    return low, np.minimum(low + 1, n_in - 1), source - low.astype(np.float32)


def _predict(image: np.ndarray, heads: Sequence[HeadLogits]) -> list[np.ndarray]:
    return [marginal.argmax(axis=0).astype(np.int16) for marginal in refine(image, heads)]


def _start_worker() -> None:
    follow_main_process()
    # glibc reuses memory: returning and mapping pydensecrf's tables takes a fifth of its time
    with contextlib.suppress(OSError, AttributeError):  # another C library
        glibc = ctypes.CDLL("libc.so.6")
        trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
        if any(glibc.mallopt(mmap, size) for size in (2**30, 2**25)):  # 2**25: before glibc 2.35
            glibc.mallopt(trim, 2**30)


class CrfPool(ProcessPoolExecutor):
    """Processes, one per core by default, that refine images while the network continues."""

    on_device = False

    def __init__(self, workers: int | None = None) -> None:
        workers = workers or cores()
        self.most_pending = 4 * workers
        spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads and CUDA context
        super().__init__(workers, spawn, initializer=_start_worker)

    def refine(self, image: np.ndarray, heads: Sequence[HeadLogits]) -> Future:
        """Queues one image; the result is its predictions (H, W) int16 per head."""
        return self.submit(_predict, image, heads)

    def __exit__(self, *_exception) -> None:
        self.shutdown(wait=True, cancel_futures=True)
