import pytest
import torch

from utils.errors import UserError
from utils.training import trainer as training


@pytest.fixture
def on(monkeypatch):
    def on(device, count=1):
        """Pretends that this machine has such devices."""
        monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda")
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: device == "mps")

    return on


def test_device__is_chosen_and_gpu_ids_are_checked(tiny_options, on, capsys):
    on("cuda", 2)
    assert training.device_settings(tiny_options(gpu_ids=[1])) == {
        "accelerator": "cuda",
        "devices": [1],
        "num_nodes": 1,
        "strategy": "auto",
    }
    with pytest.raises(UserError, match=r"gpu_ids is \[2\], must be one device from 0 to 1"):
        training.device_settings(tiny_options(gpu_ids=[2]))
    assert training.cuda_devices(tiny_options(trainer__devices=2)) == [0, 1]
    assert training.cuda_devices(tiny_options(trainer__devices=2, gpu_ids=[1, 0])) == [1, 0]
    for chosen in ([1], [1, 1], [0, 2]):
        with pytest.raises(UserError, match=r"must be 2 different devices \(trainer\.devices\) from 0 to 1"):
            training.cuda_devices(tiny_options(trainer__devices=2, gpu_ids=chosen))
    with pytest.raises(UserError, match=r"trainer\.devices is 4, must be at most 2"):
        training.cuda_devices(tiny_options(trainer__devices=4))
    on("mps")
    assert training.device_settings(tiny_options())["accelerator"] == "mps"
    with pytest.raises(UserError, match=r"trainer\.devices is 2, must be 1 on mps"):
        training.device_settings(tiny_options(trainer__devices=2))
    on("cpu")
    assert training.device_settings(tiny_options())["accelerator"] == "cpu"
    assert "gpu_ids [0] ignored" in capsys.readouterr().out


def test_precision__auto_and_the_published_scaler(tiny_options, monkeypatch):
    assert training.precision_settings(tiny_options(), "cpu") == {"precision": "32-true"}
    low = tiny_options(train__precision="bf16")
    assert training.precision_settings(low, "cpu") == {"precision": "bf16-mixed"}
    made = []
    monkeypatch.setattr("torch.amp.GradScaler", lambda device, **settings: made.append((device, settings)))
    (plugin,) = training.precision_settings(tiny_options(), "cuda")["plugins"]
    assert plugin.precision == "16-mixed"
    training.precision_settings(tiny_options(trainer__devices=4), "cuda")  # whose loss is 4 times as large
    found = [settings for settings in made if settings[1]]  # others are of the precision plugin
    assert found == [("cuda", {"init_scale": scale, "growth_interval": 1000}) for scale in (2048, 512)]
    with pytest.raises(UserError, match=r"train\.precision is fp16"):
        training.precision_settings(tiny_options(train__precision="fp16"), "cpu")


def test_backends__no_crf_in_torch_on_mps(tiny_options, on):
    on("mps")
    training.check_backends(tiny_options())
    with pytest.raises(UserError, match=r"eval\.crf_backend is torch, must be pydensecrf on mps"):
        training.check_backends(tiny_options(eval__crf_backend="torch"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.\nmore"), "out of memory"),
        (MemoryError(), r"lower .*batch_size \(now 4.*cache_features=disk"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), r"num_workers \(now 0\)"),
    ],
)
def test_explained_errors__say_what_to_lower(tiny_options, error, expected):
    options = tiny_options(dataset__cache_features="ram")
    with pytest.raises(UserError, match=expected), training.explained_errors(options):
        raise error


def test_explained_errors__leave_other_errors_alone(tiny_options):
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError) as raised, training.explained_errors(tiny_options()):
        raise error
    assert raised.value is error
