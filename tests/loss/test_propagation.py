from dataclasses import replace

import torch
from torch.nn import functional as F

from loss.propagation import Boundaries, Propagation, propagate, propagations, select_sets


def test_propagate__empty_set_keeps_the_proxy():
    bank = F.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    reached = propagate(bank[:2], bank, Boundaries(1.5, 0.2, 3, sigma_pos=0.01, sigma_amb=0.01))
    torch.testing.assert_close(reached.proxies, bank[:2])
    assert (reached.phi == 1.5).all()
    torch.testing.assert_close(reached.psi, torch.full((2, 1), 0.2))


def test_propagations__each_step_is_a_shorter_run():
    bank = F.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(3)), dim=1)
    boundaries = Boundaries(0.3, 0.0, 3, sigma_pos=3, sigma_amb=3)
    count = 0
    for steps, reached in enumerate(propagations(bank[:7], bank, boundaries)):
        alone = propagate(bank[:7], bank, replace(boundaries, steps=steps))
        for name in ("proxies", "similarity", "phi", "psi", "moved"):
            torch.testing.assert_close(getattr(reached, name), getattr(alone, name), rtol=0, atol=0)
        count += 1
    assert count == 4


def test_select_sets__without_the_anchor_and_the_ambiguous():
    similarity = torch.tensor([[0.9, 0.7, 0.4, 0.1], [0.1, 0.1, 0.9, 0.1]])
    edge = torch.tensor([[0.5], [0.5]])
    sets = select_sets(Propagation(None, similarity, edge, edge - 0.3, None), torch.tensor([0, 3]))
    assert sets.positives.tolist() == [[False, True, False, False], [False, False, True, False]]
    assert sets.negatives.tolist() == [[False, False, False, True], [True, True, False, False]]
