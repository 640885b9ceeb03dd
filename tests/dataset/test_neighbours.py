from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dataset import build_data, neighbours
from dataset.neighbours import most_similar
from dataset.samplers import TrainBatchSampler
from utils.errors import UserError
from utils.training import distributed


def test_most_similar__equals_its_definition_for_any_block(monkeypatch):
    rows = F.normalize(torch.randn(23, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    expected = [
        sorted((j for j in range(23) if j != i), key=lambda j: -float(rows[i] @ rows[j]))[:4]
        for i in range(23)
    ]
    for entries in (1, 23 * 7, 2**20):
        monkeypatch.setattr(neighbours, "SIMILARITIES", entries)
        assert most_similar(rows, 4).tolist() == expected


def weights(name):
    """The arguments that name the weights."""
    return {"backbone": SimpleNamespace(digest=lambda: name), "precision": "32-true"}


@pytest.fixture
def encoded():
    """An encoder, and the number of images that it has seen."""
    seen = []

    def encode(inputs, *, label):
        seen.append(len(inputs))
        return inputs.float() - inputs.float().mean()  # (B, 3, H, W)

    return encode, seen


def test_neighbours__are_of_the_mean_features_and_computed_once(tiny_options, encoded):
    encode, seen = encoded
    data = build_data(tiny_options(method="stego", stego__num_neighbors=3))
    table = data.with_neighbours(encode, **weights("a")).neighbours
    items = torch.stack([item.inputs for item in data.train_set]).float()
    batches = [batch - batch.mean() for batch in items.split(8)]
    means = F.normalize(torch.cat(batches).mean(dim=(2, 3)), dim=1)
    assert torch.equal(table, most_similar(means, 3))
    assert sum(seen) == len(items) == 16
    assert torch.equal(data.with_neighbours(encode, **weights("a")).neighbours, table)
    assert sum(seen) == 16
    data.with_neighbours(encode, **weights("others"))
    assert sum(seen) == 32
    assert data.neighbours is None


def test_neighbours__published_dropout_depends_on_the_seed(tiny_options, encoded):
    tables = []
    for seed, dropout in ((0, 0.5), (1, 0.5), (0, 0.0), (1, 0.0)):
        chosen = {"train__seed": seed, "stego__knn_dropout": dropout, "stego__num_neighbors": 5}
        data = build_data(tiny_options(method="stego", **chosen))
        tables.append(data.with_neighbours(encoded[0], **weights("a")).neighbours)
    assert not torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert sum(encoded[1]) == 3 * 16, "without dropout, seeds share a table"


def test_neighbours__more_than_there_are(tiny_options, encoded):
    data = build_data(tiny_options(method="stego", stego__num_neighbors=16))
    with pytest.raises(UserError, match=r"stego\.num_neighbors is 16, must be below 16"):
        data.with_neighbours(encoded[0], **weights("a"))


def test_sampler__a_neighbour_of_each_image_follows(monkeypatch):
    """Two ranks share the pairs of one; resuming and the order of the images do not depend on neighbours."""
    table = torch.arange(12)[:, None] * 100 + torch.arange(3)  # (12, 3)
    plain, paired = (TrainBatchSampler(12, 4, seed=3, neighbours=each) for each in (None, table))
    batches = list(paired)
    assert [batch[:4] for batch in batches] == list(plain)
    for batch in batches:
        assert [index // 100 for _, index in batch[4:]] == [index for _, index in batch[:4]]
    chosen = [index % 100 for batch in batches for _, index in batch[4:]]
    assert set(chosen) == {0, 1, 2}
    assert list(TrainBatchSampler(12, 4, seed=3, neighbours=table, first_step=1)) == batches[1:]
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(paired))
    for first, second, whole in zip(*shares, batches, strict=True):
        assert [*first[:2], *second[:2], *first[2:], *second[2:]] == whole
