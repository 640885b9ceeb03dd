import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from utils.config.loading import REPOSITORY
from utils.vision.crf import CrfPool, HeadLogits, crf_missing, refine, unary_energy
from utils.vision.transforms import to_eight_bit
from utils.vision.upsampling import upsample


@pytest.fixture
def stored(golden):
    return golden("crf")


def eight_bit(stored):
    return to_eight_bit(stored.image[None])[0].permute(1, 2, 0).numpy()


def test_refine__golden(stored):
    marginals = refine(eight_bit(stored), [HeadLogits(stored.logits.numpy())])[0]
    assert (marginals.argmax(0) == stored.argmax.numpy()).mean() >= 0.999
    assert np.abs(marginals - stored.q.numpy()).max() < 1e-3


def test_refine__heads_on_one_lattice_equal_heads_alone(stored):
    image, rng = eight_bit(stored), np.random.default_rng(0)
    first, second = stored.logits.numpy(), rng.normal(size=(7, 16, 16)).astype(np.float32)
    together = refine(image, [HeadLogits(first), HeadLogits(second), HeadLogits(first)])
    for marginals, logits in zip(together, (first, second, first), strict=True):
        alone = refine(image, [HeadLogits(logits)])[0]
        assert marginals.shape == alone.shape
        np.testing.assert_allclose(marginals, alone, atol=1e-5)


def test_head__divisor_applies_after_upsampling():
    logits = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    divisor = np.full((8, 10), 2, dtype=np.float32)
    np.testing.assert_allclose(HeadLogits(logits, divisor).at((8, 10)), upsample(logits, (8, 10)) / 2)


@pytest.mark.parametrize(
    "shape", [(5, 7, 40, 33), (8, 8, 8, 8), (1, 1, 6, 4), (40, 40, 320, 320), (9, 9, 4, 5)]
)
def test_upsample__equals_torch(shape):
    h, w, height, width = shape
    logits = torch.randn(3, h, w, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(logits[None], size=(height, width), mode="bilinear")[0].numpy()
    np.testing.assert_allclose(upsample(logits.numpy(), (height, width)), expected, atol=1e-5)


def test_unary__is_minus_log_of_a_clipped_softmax():
    energy = unary_energy(np.array([[0.0], [100.0]], dtype=np.float32))
    np.testing.assert_allclose(energy[:, 0], [-np.log(1e-5), 0], atol=1e-6)


def test_worker__imports_no_torch():
    code = "import sys, utils.vision.crf; assert not any(m.split('.')[0] == 'torch' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize("program", ["run", "eval"])
def test_worker__main_module_imports_no_torch(program):
    """Spawned workers import the main program again."""
    code = f"import sys, {program}; assert not any(m.split('.')[0] == 'torch' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_missing__is_told(monkeypatch):
    assert crf_missing() is None
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    assert "pydensecrf" in crf_missing()


def test_pool__error_in_a_worker_reaches_the_caller():
    with CrfPool(1) as pool:
        pool.submit(np.zeros((4, 4, 3), dtype=np.uint8), ["not a head"], tag=0)
        with pytest.raises(AttributeError):
            list(pool.finished(wait_for_one=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own")
def test_keep_freed_memory__leaves_no_page_faults_behind():
    """In a process of its own: what it sets lasts as long as the process."""
    program = """
import resource, numpy
from utils.vision.crf import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        [numpy.ones(2**21) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
plain = faults()
keep_freed_memory()
faults()
print(plain, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    plain, kept = map(int, done.stdout.split())
    assert kept < plain / 10
