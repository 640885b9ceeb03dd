import pytest

from dataset.samplers import StepSampler
from utils.errors import UserError
from utils.training.schedule import Schedule


def test_batch__larger_than_the_train_split(data_of, directory):
    with pytest.raises(UserError, match=r"batch_size is 5, but there are only 4 train items"):
        data_of("directory", directory, dataloader__batch_size=5)


def test_order__is_a_function_of_seed_and_epoch(data_of, directory):
    sampler = data_of("directory", directory, train__epoch=3).train_dataloader().batch_sampler
    orders = [sampler.order(epoch) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2]
    assert sorted(orders[0]) == [0, 1, 2, 3]
    assert data_of("directory", directory, train__seed=4).sampler.seed == 4


@pytest.mark.parametrize("done", [0, 1, 2, 3, 6, 7])
def test_batches__begin_at_any_step(done):
    """11 items, batches of 3: 3 steps an epoch, two items of each left out."""
    sampler = StepSampler(11, 3, Schedule(per_epoch=3, epochs=3, valid_freq=2), seed=1)
    whole = list(sampler)
    assert len(sampler) == len(whole) == 9
    assert [len(batch) for batch in whole] == [3] * 9
    for epoch in range(3):
        taken = [pair for batch in whole[3 * epoch : 3 * epoch + 3] for pair in batch]
        assert taken == [(epoch, index) for index in sampler.order(epoch)[:9]]
    assert [sampler.batch(step) for step in range(1, 10)] == whole
    sampler.done = done
    assert list(sampler) == whole[done:]
    assert len(sampler) == 9 - done
