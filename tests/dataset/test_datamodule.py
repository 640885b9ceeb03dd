import pytest

from utils.errors import UserError


def test_batch__larger_than_the_train_split(data_of, directory):
    with pytest.raises(UserError, match=r"batch_size is 5, but there are only 4 train items"):
        data_of("directory", directory, dataloader__batch_size=5)


def test_order__is_a_function_of_seed_and_epoch(data_of, directory):
    data = data_of("directory", directory)
    sampler = data.train_dataloader().sampler
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
    assert orders[0] == orders[2]
    assert sorted(orders[0]) == [0, 1, 2, 3]
    assert data_of("directory", directory, train__seed=4).train_dataloader().sampler.seed == 4
