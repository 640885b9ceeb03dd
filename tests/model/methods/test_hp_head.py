import copy
import json

import torch

from model.methods.hp import update_average
from model.segmenter import TwoBranchHead

PARTS = {"1.0": "linear", "2.0": "nonlinear.0", "2.2": "nonlinear.2"}  # published name -> ours


def stored_head(stored, when, branch):
    """A head with the stored weights whose published names start with `branch`."""
    state = {}
    for theirs, ours in PARTS.items():
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = getattr(stored, f"{when}/{branch}{theirs}.{kind}")
    channels, dim = state["linear.weight"].shape[:2]
    head = TwoBranchHead(dim, channels)
    head.load_state_dict(state)
    return head


def test_head__golden(golden):
    stored = golden("hp_mix")
    features = stored.feat[:, 1:].transpose(1, 2).unflatten(2, (4, 4))  # (B, D, h, w), without CLS
    for branch, expected in (("cluster", stored.code), ("ema_model", stored.code_ema)):
        code = stored_head(stored, "before", branch)(features).detach()
        torch.testing.assert_close(code, expected, rtol=1e-5, atol=1e-5)


def test_update_average__golden(golden):
    stored = golden("hp_mix")
    head, average = (stored_head(stored, "before", branch) for branch in ("cluster", "ema_model"))
    update_average(average, head, momentum=json.loads(stored.config)["ema_m"])
    for theirs, ours in PARTS.items():
        for kind in ("weight", "bias"):
            expected = getattr(stored, f"after/ema_model{theirs}.{kind}", None)
            if expected is not None:
                parameter = average.get_parameter(f"{ours}.{kind}").detach()
                torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7)


def test_update_average__of_all_parameters_and_no_others():
    head, average = TwoBranchHead(4, 3), TwoBranchHead(4, 3)
    unchanged, before = copy.deepcopy(head), copy.deepcopy(average)
    update_average(average, head, momentum=0.75)
    for new, old, other in zip(average.parameters(), before.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * other)
    assert all(map(torch.equal, head.parameters(), unchanged.parameters()))


def test_head__either_branch_has_its_own_dropout():
    head, features = TwoBranchHead(4, 3), torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    kept, dropped = torch.ones(2, 4, 1, 1), torch.zeros(2, 4, 1, 1)
    without_linear = head(features, (dropped, kept))
    without_nonlinear = head(features, (kept, dropped))
    constant = head(features, (dropped, dropped))
    assert torch.equal(constant, constant[:1, :, :1, :1].expand_as(constant))
    torch.testing.assert_close(without_linear + without_nonlinear - constant, head(features))
    torch.testing.assert_close(
        without_nonlinear - constant, head.linear(features) - head.linear(0 * features)
    )
