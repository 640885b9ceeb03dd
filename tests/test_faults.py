"""Faults from outside the program: the message says what to do, and the run resumes from what was saved."""

import multiprocessing
import resource

import pytest
import torch

import run
from model.module import PPAPModule
from tests.dataset.files import picture, save
from tests.test_resume import LONG, assert_same_run, fast, whole  # noqa: F401
from utils.errors import NotFinite, UserError


@pytest.fixture
def fault_at(monkeypatch):
    def fault_at(step, fault):
        """Passes the losses of a step through `fault`, which may change them or raise; returns an undo."""
        plain, target = PPAPModule.losses, step

        def faulty(module, batch, *, step):
            losses = plain(module, batch, step=step)
            return fault(losses) if step == target else losses

        monkeypatch.setattr(PPAPModule, "losses", faulty)
        return monkeypatch.undo

    return fault_at


def not_a_number(losses):
    values, statistics = losses
    return values | {"linear_loss": values["linear_loss"] * torch.nan}, statistics


def saved(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def test_full_disk__while_saving(tiny_file, tmp_path, whole, fault_at):  # noqa: F811
    """After step 5 no file of this process may grow beyond 10 kB."""
    path, folder = tiny_file(**LONG), tmp_path / "output/tiny"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(losses):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        return losses

    undo = fault_at(5, fill)
    try:
        with pytest.raises(UserError, match=r"\.ckpt: cannot be written .*is intact"):
            run.main(["--opt", path])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    undo()
    assert saved(folder)["progress"]["step"] == 4
    assert not list(folder.glob("*.part"))
    run.main(["--opt", path, "--resume"])
    assert_same_run(folder, whole)


def test_memory__says_what_to_lower_and_keeps_what_was_saved(tiny_file, tmp_path, fault_at):
    def exhaust(losses):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.\nmore")

    fault_at(6, exhaust)
    with pytest.raises(UserError, match=r"^out of memory \(CUDA out of memory.*val_batch_size"):
        run.main(["--opt", tiny_file(**LONG)])
    assert saved(tmp_path / "output/tiny")["progress"]["step"] == 4


def test_nonfinite__stops_with_step_parts_and_images(tiny_file, tmp_path, fault_at):
    fault_at(6, not_a_number)
    with pytest.raises(NotFinite, match=r"step 6") as error:
        run.main(["--opt", tiny_file(**LONG)])
    named = [line for line in str(error.value).splitlines() if "synthetic train scene" in line]
    assert len(named) == 4
    assert saved(tmp_path / "output/tiny")["progress"]["step"] == 4


def test_nonfinite__a_step_is_skipped_and_counted(tiny_file, tmp_path, fault_at):
    fault_at(6, not_a_number)
    run.main(["--opt", tiny_file(**LONG), "train.skip_nonfinite=true"])
    content = saved(tmp_path / "output/tiny")
    assert content["ppap"]["skipped_steps"] == 1
    assert content["progress"]["step"] == 12
    steps = {int(state["step"]) for state in content["optimizer_states"][0]["state"].values()}
    assert steps == {11}  # all but one have changed the weights
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


@pytest.fixture
def photographs(tmp_path):
    for number in range(16):
        save(tmp_path / f"photos/{number}.png", picture(number))
    return {
        "dataset__data_type": "directory",
        "dataset__data_path": str(tmp_path / "photos"),
        "dataset__n_classes": 5,
        "dataloader__num_workers": 2,
        "train__epoch": 6,
    }


def test_loader__missing_images_and_killed_workers(tiny_file, tmp_path, photographs, fault_at):
    """An image goes missing, then the workers are killed; the run resumes after both."""
    path, folder = tiny_file(**LONG | photographs), tmp_path / "photos"
    run.main(["--opt", path, "wandb.name=whole"])

    def hide(losses):
        folder.rename(tmp_path / "elsewhere")
        return losses

    undo = fault_at(5, hide)
    with pytest.raises(UserError, match=rf"^{folder}/\d+\.png: not a readable image \(.*No such file"):
        run.main(["--opt", path])
    undo()
    (tmp_path / "elsewhere").rename(folder)
    reached = saved(tmp_path / "output/tiny")["progress"]["step"]
    assert 5 <= reached < 24

    def kill(losses):
        for child in multiprocessing.active_children():
            child.kill()
        return losses

    undo = fault_at(reached + 1, kill)
    with pytest.raises(UserError, match=r"DataLoader worker was killed .*num_workers \(now 2\).*--resume"):
        run.main(["--opt", path, "--resume"])
    undo()
    run.main(["--opt", path, "--resume", "dataloader.num_workers=0"])
    assert_same_run(tmp_path / "output/tiny", tmp_path / "output/whole")
