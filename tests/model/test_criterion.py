import pytest
import torch

from model.criterion import OwnLoss, build_criterion
from utils.errors import UserError

Z = torch.ones(4, 3, requires_grad=True)
FEATURES = torch.ones(1, 3, 2, 2)


def called(loss):
    return OwnLoss("mine", loss)(Z, FEATURES, generator=torch.Generator())


def test_own_loss__may_be_a_function_of_two_arguments_and_return_a_scalar():
    output = called(lambda z, features: (z * features.mean()).sum())
    assert output.loss == 12
    assert output.statistics() == {}


def test_own_loss__gets_the_generator_if_it_takes_one():
    assert called(lambda z, features, generator: z.sum() * isinstance(generator, torch.Generator)).loss == 12
    assert called(lambda z, features, **given: z.sum() * len(given)).loss == 12


@pytest.mark.parametrize("returned", [None, 1.5, Z, torch.ones(()), {"loss": 1}])
def test_own_loss__wrong_values_are_named(returned):
    with pytest.raises(
        UserError, match=r"training_coeff\.loss is mine, which returned .*; must return a scalar"
    ):
        called(lambda z, features: returned)


def test_criterion__gets_the_coefficients_of_the_options(tiny_options):
    criterion = build_criterion(tiny_options(training_coeff__products="split", training_coeff__tau=0.5))
    assert (criterion.products, criterion.tau) == ("split", 0.5)
