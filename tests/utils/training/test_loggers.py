from unittest.mock import MagicMock

from utils.files import make_folder
from utils.training.trainer import loggers as loggers_


def test_wandb__never_waits_for_login_or_network(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "not logged in" in loggers_.wandb_obstacle()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://nowhere.invalid")
    assert loggers_.wandb_obstacle() == "nowhere.invalid cannot be reached"


def test_wandb__offline_run_is_recorded_beside_the_run(monkeypatch, tmp_path, tiny_options):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    loggers = loggers_.build_loggers(
        tiny_options(wandb__mode="online"), make_folder(tmp_path / "out" / "run")
    )
    assert [type(logger).__name__ for logger in loggers] == ["RunCSVLogger", "StepWandbLogger"]
    loggers[1].log_metrics({"train_loss": 1.0}, step=1)
    loggers[1].experiment.finish()
    assert list((tmp_path / "out" / "run").rglob("run-*.wandb"))


def test_wandb__disabled_leaves_the_csv(tmp_path, tiny_options):
    loggers = loggers_.build_loggers(tiny_options(), tmp_path)
    assert [type(logger).__name__ for logger in loggers] == ["RunCSVLogger"]


def test_wandb__goes_on_with_a_run_that_is_named(monkeypatch, tmp_path, tiny_options):
    asked = []
    monkeypatch.setattr(loggers_, "wandb_obstacle", lambda: None)
    monkeypatch.setattr(loggers_.wandb, "init", lambda **given: (asked.append(given), MagicMock())[1])
    chosen = {"wandb__mode": "online", "wandb__tags": ["a"], "wandb__notes": "b"}
    for id in ("abc", None):
        loggers_.build_loggers(tiny_options(wandb__id=id, **chosen), tmp_path)
    assert [(given["id"], given["resume"]) for given in asked] == [("abc", "allow"), (None, None)]
    assert (asked[0]["tags"], asked[0]["notes"], asked[0]["mode"]) == (["a"], "b", "online")
    assert asked[0]["config"]["training_coeff"]["tau"] == 0.8
    assert "git_sha" in asked[0]["config"]
