from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from utils.errors import UserError
from utils.training import device


@pytest.fixture
def on(monkeypatch):
    def on(kind, count=1):
        """Pretends that this machine has such devices."""
        monkeypatch.setattr("torch.cuda.is_available", lambda: kind == "cuda")
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: kind == "mps")

    return on


def test_device__is_chosen_and_gpu_ids_are_checked(tiny_options, on):
    def devices(count=1, gpu_ids=(0,)):
        return device.device_settings(tiny_options(gpu_ids=list(gpu_ids), trainer__devices=count))["devices"]

    on("cuda", 2)
    assert devices(gpu_ids=[1]) == [1]
    assert devices(2) == [0, 1]
    assert devices(2, gpu_ids=[1, 0]) == [1, 0]
    assert device.device_name(tiny_options(gpu_ids=[1])) == "cuda:1"
    for count, gpu_ids in ((1, [2]), (2, [1]), (2, [1, 1]), (4, [0])):
        with pytest.raises(UserError, match=rf"must be {count} \(trainer\.devices\) different .* the 2 on"):
            devices(count, gpu_ids)
    on("mps")
    assert device.device_name(tiny_options()) == "mps"
    on("cpu")
    assert device.device_name(tiny_options()) == "cpu"


def test_precision__auto_and_the_published_scaler(tiny_options, monkeypatch):
    assert device.precision_settings(tiny_options(), "cpu") == {"precision": "32-true"}
    low = tiny_options(train__precision="bf16")
    assert device.precision_settings(low, "cpu") == {"precision": "bf16-mixed"}
    made = []
    monkeypatch.setattr("torch.amp.GradScaler", lambda device, **settings: made.append(settings))
    (plugin,) = device.precision_settings(tiny_options(), "cuda")["plugins"]
    assert plugin.precision == "16-mixed"
    device.precision_settings(tiny_options(trainer__devices=4), "cuda")  # whose loss is 4 times as large
    found = [settings for settings in made if settings]  # others are of the precision plugin
    assert found == [{"init_scale": scale, "growth_interval": 1000} for scale in (2048, 512)]
    with pytest.raises(UserError, match=r"train\.precision is fp16"):
        device.precision_settings(tiny_options(train__precision="fp16"), "cpu")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.\nmore"), "out of memory"),
        (MemoryError(), r"lower .*val_batch_size.*cache_features=disk"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "num_workers"),
        (BrokenProcessPool("terminated abruptly"), "crf_workers"),
    ],
)
def test_explained_errors__say_what_to_lower(error, expected):
    with pytest.raises(UserError, match=expected), device.explained_errors():
        raise error


@pytest.mark.parametrize("kind", [RuntimeError, torch.distributed.DistError])
def test_explained_errors__another_process_has_ended(monkeypatch, kind):
    monkeypatch.setattr(device, "world_size", lambda: 2)
    error = kind("[/gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    with pytest.raises(UserError, match="another process of this run has ended"), device.explained_errors():
        raise error
