import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.conftest import needs_pydensecrf
from utils.config.loading import REPOSITORY
from utils.errors import UserError
from utils.vision.crf import HeadLogits, crf_missing, refine, resolve_backend, upsample
from utils.vision.transforms import to_eight_bit


@pytest.fixture
def stored(golden):
    """The golden image as (H, W, 3) uint8, with its logits and marginals."""
    found = golden("crf")
    found.image = to_eight_bit(found.image[None])[0].permute(1, 2, 0).numpy()
    return found


@needs_pydensecrf
def test_refine__golden(stored):
    marginals = refine(stored.image, [HeadLogits(stored.logits.numpy())])[0]
    assert (marginals.argmax(0) == stored.argmax.numpy()).mean() >= 0.999
    assert np.abs(marginals - stored.q.numpy()).max() < 1e-3


@needs_pydensecrf
def test_refine__heads_on_one_lattice_equal_heads_alone(stored):
    image, first = stored.image, stored.logits.numpy()
    second = np.random.default_rng(0).normal(size=(7, 16, 16)).astype(np.float32)
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


def test_worker__imports_no_torch():
    """A spawned worker also imports the main program again."""
    code = "import sys, utils.vision.crf, run, eval; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@needs_pydensecrf
def test_backend__auto_falls_back_to_torch(monkeypatch, capsys):
    assert resolve_backend("auto") == "pydensecrf"
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    assert "pydensecrf does not import" in crf_missing()
    with pytest.raises(UserError, match=r"set eval\.crf_backend=torch"):
        resolve_backend("pydensecrf")
    assert capsys.readouterr().out == ""
    assert resolve_backend("auto") == "torch"
    assert "the CRF runs in torch, because pydensecrf does not import" in capsys.readouterr().out
