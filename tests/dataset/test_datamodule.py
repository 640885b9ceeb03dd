import pytest
import torch

from dataset import build_data
from dataset.samplers import TrainBatchSampler
from utils.errors import UserError


def test_order__is_a_function_of_seed_and_epoch(data_of, directory):
    sampler = data_of("directory", directory, train__seed=4).train_dataloader().batch_sampler
    orders = [[i for batch in sampler.batches(epoch) for i in batch] for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == [0, 1, 2, 3]
    assert sampler.seed == 4


@pytest.mark.parametrize("first_step", [0, 1, 2, 3, 6, 7])
def test_batches__begin_at_any_step(first_step):
    """11 items, batches of 3: 3 steps an epoch, which drop two items each."""
    sampler = TrainBatchSampler(11, 3, seed=1, first_step=first_step)
    found = []
    for epoch in range(first_step // 3, 3):
        sampler.set_epoch(epoch)
        found += list(sampler)
    assert len(sampler) == 3
    expected = [[(epoch, i) for i in batch] for epoch in range(3) for batch in sampler.batches(epoch)]
    assert found == expected[first_step:]
    assert len({pair for batch in expected[:3] for pair in batch}) == 9


def test_random_batches__are_a_function_of_seed_and_step(tiny_options):
    data = build_data(tiny_options())  # 16 images in batches of 4
    first, again, other = ([batch.index for batch in data.random_batches(8, step)] for step in (1, 1, 2))
    assert [len(index) for index in first] == [4, 4]
    assert len(set(torch.cat(first).tolist())) == 8
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    with pytest.raises(UserError, match=r"hp\.pool_size is 17.*16"):
        data.random_batches(17, 1)


def test_crops__that_are_read_in_a_row_share_a_decode(data_of, directory, monkeypatch):
    items = data_of("directory", directory, dataset__crop_type="five", dataloader__batch_size=1).train_set
    expected, reads, read = [items[index] for index in (0, 1, 7)], [], items.source.read
    monkeypatch.setattr(items.source, "read", lambda index: reads.append(index) or read(index))
    found = [items[index] for index in range(10)]
    assert reads == [0, 1]
    for place, other in zip((0, 1, 7), expected, strict=True):
        assert torch.equal(found[place].inputs, other.inputs)
