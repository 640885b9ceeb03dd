import csv

import numpy as np
import pytest
import wandb

from tests.utils.wandb_server import wandb_server  # noqa: F401
from utils.errors import UserError
from utils.files import make_folder
from utils.training import loggers as loggers_
from utils.training.loggers import build_loggers, csv_logger, wandb_runs, wandb_step


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def test_csv__has_each_step_once_after_a_resume(tmp_path, recwarn):
    first = csv_logger(tmp_path, step=0)
    for step in range(1, 6):
        first.log_metrics({"loss": step / 3} | ({"miou": 50.0} if step == 3 else {}), step=step)
    first.save()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("0.1,")  # killed while writing
    resumed = csv_logger(tmp_path, step=3)
    resumed.log_metrics({"loss": 9.0, "grad_norm": 1.0}, step=4)
    resumed.save()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["loss"] for row in rows] == [str(1 / 3), str(2 / 3), "1.0", "9.0"]
    assert [row["miou"] for row in rows] == ["", "", "50.0", ""]
    assert not recwarn


@pytest.mark.parametrize(
    "edited",
    [
        lambda text: "\ufeff" + text,  # byte order mark
        lambda text: text.replace("0.5", "a half"),
        lambda text: text.replace("step", "steps"),
    ],
)
def test_csv__that_was_edited_is_moved_aside(tmp_path, capsys, edited):
    logger, path = csv_logger(tmp_path, step=0), tmp_path / "metrics.csv"
    logger.log_metrics({"loss": 0.5}, step=1)
    logger.save()
    path.write_text(text := edited(path.read_text()))
    resumed = csv_logger(tmp_path, step=1)
    resumed.log_metrics({"loss": 0.25}, step=2)
    resumed.save()
    assert (tmp_path / "metrics.csv.1").read_text() == text
    assert f"moved to {path}.1" in capsys.readouterr().out
    with path.open() as file:
        assert [row["loss"] for row in csv.DictReader(file)] == ["0.25"]
    path.unlink()
    csv_logger(tmp_path, step=2)
    assert f"{path} is missing" in capsys.readouterr().out


def test_wandb__without_login_is_recorded_offline(logged_out, tmp_path, tiny_options, capsys):
    folder = make_folder(tmp_path / "out" / "run")
    loggers = build_loggers(tiny_options(wandb__mode="online"), folder)
    assert "wandb: not logged in (wandb login); recording offline" in capsys.readouterr().out
    for run in wandb_runs(loggers):
        run.finish()
    assert list(folder.rglob("offline-run-*/run-*.wandb"))


def test_wandb__without_network_is_recorded_offline(monkeypatch, tmp_path, tiny_options, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://nowhere.invalid")
    monkeypatch.setattr(loggers_, "INIT_SECONDS", 1)
    loggers = build_loggers(tiny_options(wandb__mode="online"), tmp_path)
    for run in wandb_runs(loggers):
        run.finish()
    assert "recording offline" in capsys.readouterr().out
    assert list(tmp_path.rglob("run-*.wandb"))


@pytest.mark.parametrize(("machine", "files"), [("offline", 1), ("disabled", 0)])
def test_wandb__mode_of_the_machine_restricts_online(
    monkeypatch, tmp_path, tiny_options, capsys, machine, files
):
    wandb.teardown()  # which has read the mode
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", machine)
    options = tiny_options(wandb__mode="online")
    assert len(build_loggers(options, tmp_path)) == 1 + files
    assert "recording offline" not in capsys.readouterr().out  # as after a failure
    wandb.finish()
    wandb.teardown()
    assert len(list(tmp_path.rglob("offline-run-*/run-*.wandb"))) == files


@pytest.mark.parametrize(("key", "value"), [("tags", [""]), ("id", "a/b")])
def test_wandb__names_an_option_that_it_refuses(tmp_path, tiny_options, key, value):
    options = tiny_options(wandb__mode="offline", **{f"wandb__{key}": value})
    with pytest.raises(UserError, match=r"wandb refuses an option wandb\.\*: "):
        build_loggers(options, tmp_path)


def test_wandb__continues_a_run_online(wandb_server, tmp_path, tiny_options, capsys):  # noqa: F811
    options = tiny_options(wandb__mode="online")
    masks = {"truth": {"mask_data": np.zeros((8, 8), np.uint8), "class_labels": {0: "road", 1: "sky"}}}
    id = None
    for steps, validations in (((1, 2, 3), ()), ((3, 4), (3, 4))):  # stopped in the validation after step 3
        loggers = build_loggers(options, tmp_path, wandb_id=id)
        (run,), id = wandb_runs(loggers), wandb_runs(loggers)[0].id
        for step in steps:
            loggers[1].log_metrics({"iters": step, "loss": step / 3}, step=step)
            if step in validations:
                images = [wandb.Image(np.zeros((8, 8, 3), np.uint8), file_type="jpg", masks=masks)]
                row = {"iters": step, "validation/predictions": images}
                run.log(row, step=wandb_step(step, validation=True))
        run.finish()
        assert f"wandb: {wandb_server.address}/me/PPAP/runs/{id}" in capsys.readouterr().out
    rows = wandb_server.history(id)
    losses = [(row["iters"], row["loss"]) for row in rows if "loss" in row]
    assert losses == [(step, step / 3) for step in (1, 2, 3, 4)]
    assert [row["iters"] for row in rows if "validation/predictions" in row] == [3, 4]
    options = tiny_options(wandb__mode="online", wandb__id="abc")
    (run,) = wandb_runs(build_loggers(options, tmp_path, wandb_id=id))
    run.finish()
    assert run.id == "abc"  # the option takes precedence
    assert "ArtifactType" not in wandb_server.asked  # a question that blocks the run if it is not answered
