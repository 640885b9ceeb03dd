import pytest

from dataset.samplers import TrainBatchSampler
from utils.errors import UserError


def test_batch__larger_than_the_train_split(data_of, directory):
    with pytest.raises(UserError, match=r"batch_size is 5, but there are only 4 train items"):
        data_of("directory", directory, dataloader__batch_size=5)


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
