import torch
from torch.nn import functional as F

from model.methods.pools import ReferencePools
from tests.model.methods.conftest import CHANNELS, GRID, IMAGES


def renewed(segmenter, batches, *, seed=0, dropout=0.0, both=True):
    pools = ReferencePools(IMAGES * len(batches), 12, CHANNELS)
    drawn = torch.Generator().manual_seed(seed)
    pools.renew(segmenter, segmenter.head, batches, drawn, dropout=dropout, both=both)
    return pools


def test_renew__takes_a_patch_of_each_image(segmenter, batch_of):
    batches = [batch_of(1), batch_of(2)]
    pools = renewed(segmenter, batches)
    features = torch.cat([segmenter.features(segmenter.tokens(each.inputs), GRID) for each in batches])
    chosen = []
    for rows, maps in ((pools.agnostic, features), (pools.specific, segmenter.head(features).detach())):
        patches = F.normalize(maps.flatten(2), dim=1)  # (8, D, 16)
        distance = (patches - rows.float()[:, :, None]).norm(dim=1)  # (8, 16)
        assert distance.amin(dim=1).max() < 2e-3  # float16
        chosen.append(distance.argmin(dim=1))
    assert not torch.equal(*chosen)


def test_renew__is_a_function_of_the_generator(segmenter, batch_of):
    batches = [batch_of(1)]
    first, again, other = (renewed(segmenter, batches, seed=seed, dropout=0.3) for seed in (3, 3, 4))
    for name in ("agnostic", "specific"):
        rows = first.get_buffer(name)
        assert torch.equal(rows, again.get_buffer(name))
        assert not torch.equal(rows, other.get_buffer(name))
        torch.testing.assert_close(rows.float().norm(dim=1), torch.ones(len(rows)), atol=2e-3, rtol=0)
    assert (first.agnostic == 0).any(), "dropout of channels"
    assert not renewed(segmenter, batches, both=False).agnostic.any()
