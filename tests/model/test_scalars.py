import torch

from loss import PPAPLossOutput
from model import scalars
from model.scalars import Pace, StepLosses, plain_numbers


def test_step_losses__a_loss_of_ones_own_need_not_say_how_far_proxies_went():
    one = torch.ones(())
    found = StepLosses(3 * one, one, None, PPAPLossOutput(2 * one, one, one)).scalars()
    assert plain_numbers(found) == {
        "total_loss": 3.0,
        "cluster_loss": 1.0,
        "train_loss": 1.0,
        "supcon_loss": 2.0,
        "num_positives": 1.0,
        "num_negatives": 1.0,
    }


def test_plain_numbers__tensors_and_others_keep_their_order():
    assert plain_numbers({"a": 1, "b": torch.tensor(2.5), "c": 3e10}) == {"a": 1.0, "b": 2.5, "c": 3e10}
    assert plain_numbers({"a": 1}) == {"a": 1.0}


def test_pace__pauses_count_for_nothing(monkeypatch):
    now = iter([0.0, 10.0, 15.0, 16.0])
    monkeypatch.setattr(scalars.time, "perf_counter", lambda: next(now))
    pace, cpu = Pace(), torch.device("cpu")
    pace.images = 4
    assert pace.scalars(cpu) == {}  # the first step warms up
    pace.images += 12
    pace.pause()  # from 10 s
    pace.resume()  # to 15 s
    assert pace.scalars(cpu) == {"images_per_s": 12 / 11}
