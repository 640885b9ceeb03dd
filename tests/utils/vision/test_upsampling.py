import pytest
import torch
from torch.nn import functional as F

from utils.vision import upsampling
from utils.vision.upsampling import upsampled_argmax, upsampled_norm

LOGITS = torch.randn(3, 5, 6, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(97, 131), (6, 9), (4, 5)])
@pytest.mark.parametrize("held", [1, 2 * 5 * 97 * 131, 2**22])  # one image at a time, a leftover, all
def test_argmax__equals_interpolate_to_the_last_bit(monkeypatch, size, held):
    monkeypatch.setattr(upsampling, "HELD", {"cpu": held})
    last = LOGITS.contiguous(memory_format=torch.channels_last)
    expected = F.interpolate(last, size=size, mode="bilinear").max(dim=1)
    values, indices = upsampled_argmax(LOGITS, size)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize("extent", [None, (21 / 4, 34 / 4), (6.0, 34 / 4), (6.0, 9.0)])
@pytest.mark.parametrize("held", [1, 10**4])
def test_argmax__in_strips_equals_the_whole(monkeypatch, extent, held):
    size = (97, 131)
    values, indices = upsampled_argmax(LOGITS, size, extent)
    monkeypatch.setattr(upsampling, "HELD", {"cpu": held})
    monkeypatch.setattr(upsampling, "LARGEST", 1)
    in_strips, channels = upsampled_argmax(LOGITS, size, extent)
    torch.testing.assert_close(in_strips, values, rtol=1e-5, atol=1e-5)
    assert (channels == indices).float().mean() > 0.9999  # ties


def test_argmax__extent_crops_the_padding():
    """A grid of 6 x 9 patches of 4 pixels, of which the image has 21 x 34 pixels."""
    full = F.interpolate(LOGITS, size=(24, 36), mode="bilinear")[..., :21, :34].max(dim=1)
    values, indices = upsampled_argmax(LOGITS, (21, 34), (21 / 4, 34 / 4))
    torch.testing.assert_close(values, full.values)
    assert torch.equal(indices, full.indices)


def test_argmax__memory_is_bounded(monkeypatch):
    """The upsampled logits of 3 megapixels and 5 channels would be 60 MB; strips hold 400 kB."""
    seen = []
    upsampled = upsampling._upsampled
    monkeypatch.setattr(upsampling, "_upsampled", lambda *given: seen.append(upsampled(*given)) or seen[-1])
    monkeypatch.setattr(upsampling, "HELD", {"cpu": 10**5})
    monkeypatch.setattr(upsampling, "LARGEST", 10**5)
    upsampled_argmax(LOGITS[:1], (1500, 2000))
    assert max(part.numel() for part in seen) <= 10**5


@pytest.mark.parametrize("shape", [(13, 7, 97, 64), (16, 16, 224, 224), (1, 3, 8, 9), (8, 8, 8, 8)])
def test_norm__equals_the_norm_of_the_upsampled_map(shape):
    h, w, height, width = shape
    code = torch.randn(2, 24, h, w, generator=torch.Generator().manual_seed(0))
    literal = F.interpolate(code, size=(height, width), mode="bilinear").norm(dim=1)
    torch.testing.assert_close(upsampled_norm(code, (height, width)), literal, atol=2e-5, rtol=1e-5)
