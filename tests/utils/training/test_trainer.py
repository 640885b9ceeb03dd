import json

import pytest

from utils.errors import UserError
from utils.files import make_folder, move_aside, write_json
from utils.training.trainer import trainer as training


def test_device__is_chosen_and_gpu_ids_are_checked(tiny_options, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
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
        with pytest.raises(UserError, match=r"must be 2 devices \(trainer\.devices\) from 0 to 1"):
            training.cuda_devices(tiny_options(trainer__devices=2, gpu_ids=chosen))
    with pytest.raises(UserError, match=r"trainer\.devices is 4, must be at most 2"):
        training.cuda_devices(tiny_options(trainer__devices=4))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert training.device_settings(tiny_options())["accelerator"] == "mps"
    with pytest.raises(UserError, match=r"trainer\.devices is 2, must be 1 on mps"):
        training.device_settings(tiny_options(trainer__devices=2))
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert training.device_settings(tiny_options())["accelerator"] == "cpu"
    assert "gpu_ids [0] ignored" in capsys.readouterr().out


def test_precision__auto_and_the_published_scaler(tiny_options, monkeypatch):
    assert training.precision_settings(tiny_options(), "cpu") == {"precision": "32-true"}
    assert training.precision_settings(tiny_options(train__precision="bf16"), "cpu") == {
        "precision": "bf16-mixed"
    }
    made = []
    monkeypatch.setattr("torch.amp.GradScaler", lambda device, **settings: made.append((device, settings)))
    (plugin,) = training.precision_settings(tiny_options(), "cuda")["plugins"]
    assert plugin.precision == "16-mixed"
    training.precision_settings(tiny_options(trainer__devices=4), "cuda")  # whose loss is 4 times as large
    found = [settings for settings in made if settings[1]]  # others are of the precision plugin
    assert found == [("cuda", {"init_scale": scale, "growth_interval": 1000}) for scale in (2048, 512)]
    with pytest.raises(UserError, match=r"train\.precision is fp16"):
        training.precision_settings(tiny_options(train__precision="fp16"), "cpu")


def test_write_json__is_standard_json(tmp_path):
    write_json(tmp_path / "m.json", {"a": float("nan"), "b": (1, 2), "c": {"d": float("inf")}})
    text = (tmp_path / "m.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word)) == {
        "a": None,
        "b": [1, 2],
        "c": {"d": None},
    }


def test_move_aside__keeps_every_earlier_run(tmp_path):
    run = tmp_path / "run"
    for number in (1, 2):
        run.mkdir()
        (run / "best.ckpt").write_text(str(number))
        assert move_aside(run) == tmp_path / f"run.{number}"
    assert [(tmp_path / f"run.{n}/best.ckpt").read_text() for n in (1, 2)] == ["1", "2"]
    assert move_aside(run) is None


def test_make_folder__that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another output_dir"):
        make_folder(tmp_path / "file" / "run")
