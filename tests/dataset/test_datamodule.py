import pytest

from dataset.samplers import TrainBatchSampler
from utils.errors import UserError


def test_batch__larger_than_the_train_split(data_of, directory):
    with pytest.raises(UserError, match=r"batch_size is 5, but there are only 4 train items"):
        data_of("directory", directory, dataloader__batch_size=5)


def test_order__is_a_function_of_seed_and_epoch(data_of, directory):
    sampler = data_of("directory", directory, train__seed=4).train_dataloader().batch_sampler
    orders = [sampler.order(epoch) for epoch in (0, 1, 0)]
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
    expected = [(step // 3, sampler.batch(step + 1)) for step in range(first_step, 9)]
    assert found == [[(epoch, index) for index in batch] for epoch, batch in expected]
    epoch = [index for step in (4, 5, 6) for index in sampler.batch(step)]
    assert epoch == sampler.order(1)[:9]
