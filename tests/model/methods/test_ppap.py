import pytest
import torch

from model.methods.ppap import OwnLoss, build_criterion
from utils.errors import UserError

Z = torch.ones(4, 3, requires_grad=True)
FEATURES = torch.ones(1, 3, 2, 2)


def called(loss):
    return OwnLoss("mine", loss)(Z, FEATURES, generator=torch.Generator())


def test_own_loss__may_return_a_scalar_and_gets_the_generator_if_it_takes_one():
    output = called(lambda z, features: (z * features.mean()).sum())
    assert (output.loss, output.statistics()) == (12, {})
    assert called(lambda z, features, generator: z.sum() * isinstance(generator, torch.Generator)).loss == 12


@pytest.mark.parametrize("returned", [None, 1.5, Z, torch.ones(())])
def test_own_loss__wrong_values_are_named(returned):
    with pytest.raises(UserError, match=r"training_coeff\.loss is mine, which returned .*; must return"):
        called(lambda z, features: returned)


def test_criterion__gets_the_coefficients_of_the_options(tiny_options):
    criterion = build_criterion(tiny_options(training_coeff__products="split", training_coeff__tau=0.5))
    assert (criterion.products, criterion.tau) == ("split", 0.5)
