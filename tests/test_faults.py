"""Faults that come from outside: the message tells the mend, and nothing before them is lost."""

import errno
import multiprocessing
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import run
from model.module import PPAPModule
from tests.test_resume import LONG, assert_same_run, whole  # noqa: F401
from utils.config.cli import guarded
from utils.errors import NotFinite, UserError
from utils.training.checkpointing import LAST, check_digest, copy_whole, newest_complete, save_whole


@pytest.fixture
def spoil_step(monkeypatch):
    def spoil(step, fault):
        """Hands the losses of a step to `fault`, which may change them or raise."""
        plain = PPAPModule.losses

        def spoiled(module, batch, *, step):
            losses = plain(module, batch, step=step)
            return fault(losses) if step == at else losses

        at = step
        monkeypatch.setattr(PPAPModule, "losses", spoiled)
        return monkeypatch.undo

    return spoil


def no_number(losses):
    return replace(losses, total=losses.total * torch.nan, linear=losses.linear * torch.nan)


def test_full_disk__while_saving(tiny_file, tmp_path, whole, spoil_step):  # noqa: F811
    """A real one, as far as a process can have its own: after step 5 no file may grow beyond 10 kB."""
    path, folder = tiny_file(**LONG), tmp_path / "output/tiny"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(losses):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        return losses

    undo = spoil_step(5, fill)
    try:
        with pytest.raises(
            UserError, match=r"newest\.ckpt: cannot be written .* GB are free there\).*is intact"
        ):
            run.main(["--opt", path])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    undo()
    assert newest_complete(folder).progress.step == 4
    assert not list(folder.glob("*.part")) + list(folder.glob(".*.part"))
    run.main(["--opt", path, "--resume"])
    assert_same_run(folder, whole)


def test_full_disk__what_lay_there_stays(tmp_path, monkeypatch):
    save_whole({"a": torch.ones(3)}, tmp_path / "x.ckpt")
    before = (tmp_path / "x.ckpt").read_bytes()

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.training.checkpointing.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_whole({}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="No space left on device"):
        copy_whole(tmp_path / "x.ckpt", tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize(
    ("code", "word"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")]
)
def test_disk__anything_else_that_cannot_be_written(capsys, code, word):
    def main():
        raise OSError(code, word, "output/run/metrics.csv")

    assert guarded(main) == 2
    assert f"error: output/run/metrics.csv: {word}; mend that" in capsys.readouterr().err


def test_disk__other_errors_of_the_system_keep_their_traceback():
    def main():
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    with pytest.raises(ConnectionResetError):
        guarded(main)


def test_output_folder__that_cannot_be_made(tiny_file):
    with pytest.raises(UserError, match=r"/proc/ppap/\.tiny\.lock: .*choose another output_dir"):
        run.main(["--opt", tiny_file(output_dir="/proc/ppap")])


@pytest.mark.parametrize(
    "fault", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.\nmore"), MemoryError()]
)
def test_memory__names_what_to_lower_and_to_what(tiny_file, tmp_path, spoil_step, fault):
    def lack(losses):
        raise fault

    spoil_step(6, lack)
    with pytest.raises(UserError) as error:
        run.main(["--opt", tiny_file(**LONG)])
    message = str(error.value)
    assert message.startswith("out of memory (")
    assert "dataloader.batch_size=2 (now 4" in message
    assert "training_coeff.chunk_size=128 (now chosen by device" in message
    assert "cache_features" not in message  # is not in use
    assert newest_complete(tmp_path / "output/tiny").progress.step == 4


def test_memory__the_cache_is_named_where_it_is_in_memory(tiny_file, spoil_step):
    def lack(losses):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    spoil_step(1, lack)
    with pytest.raises(UserError, match=r"dataset\.cache_features=disk \(now ram\)"):
        run.main(["--opt", tiny_file(dataset__cache_features="ram")])


def test_errors_of_a_step__keep_their_traceback(tiny_file, spoil_step):
    def wrong(losses):
        raise RuntimeError("a mistake of ours")

    spoil_step(1, wrong)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run.main(["--opt", tiny_file()])


def test_nonfinite__stops_with_step_parts_and_images(tiny_file, tmp_path, spoil_step):
    spoil_step(6, no_number)
    with pytest.raises(
        NotFinite, match=r"not finite at step 6 \(PPAP \d.*, linear nan, cluster -?\d"
    ) as error:
        run.main(["--opt", tiny_file(**LONG)])
    named = [line for line in str(error.value).splitlines() if "synthetic train scene" in line]
    assert len(named) == 4
    assert newest_complete(tmp_path / "output/tiny").progress.step == 4
    check_digest(tmp_path / "output/tiny" / LAST)


def test_nonfinite__a_step_is_left_out_and_counted(tiny_file, tmp_path, spoil_step):
    undo = spoil_step(6, no_number)
    run.main(["--opt", tiny_file(**LONG), "train.skip_nonfinite=true"])
    undo()
    content = torch.load(tmp_path / "output/tiny" / LAST, weights_only=True)
    assert content["ppap"]["skipped_steps"] == 1
    assert content["progress"]["step"] == 12
    steps = {int(state["step"]) for state in content["optimizer_states"][0]["state"].values()}
    assert steps == {11}  # all but one have changed the weights
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


@pytest.fixture
def photographs(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.png")
    return {
        "dataset__data_type": "directory",
        "dataset__data_path": str(tmp_path / "photos"),
        "dataset__n_classes": 5,
        "dataloader__num_workers": 2,
    }


def test_image__that_goes_missing_midway(tiny_file, tmp_path, photographs, spoil_step, capsys):
    """In a loader's process; the step before it is kept, and the run goes on once the image is back."""
    path, folder = tiny_file(**LONG | photographs | {"train__epoch": 6}), tmp_path / "photos"
    run.main(["--opt", path, "wandb.name=whole"])

    def hide(losses):
        folder.rename(tmp_path / "elsewhere")
        return losses

    undo = spoil_step(5, hide)
    with pytest.raises(UserError, match=rf"^{folder}/\d+\.png: not a readable image \(.*No such file"):
        run.main(["--opt", path])
    undo()
    (tmp_path / "elsewhere").rename(folder)
    reached = newest_complete(tmp_path / "output/tiny").progress.step
    assert 5 <= reached < 24
    capsys.readouterr()
    run.main(["--opt", path, "--resume"])
    assert f"going on after step {reached}" in capsys.readouterr().out
    assert_same_run(tmp_path / "output/tiny", tmp_path / "output/whole")


def test_loader__that_is_killed(tiny_file, tmp_path, photographs, spoil_step):
    def kill(losses):
        for child in multiprocessing.active_children():
            child.kill()
        return losses

    undo = spoil_step(6, kill)
    path = tiny_file(**LONG | photographs | {"train__epoch": 6})
    with pytest.raises(UserError, match=r"loads images has ended .*num_workers=1 \(now 2\).*--resume"):
        run.main(["--opt", path])
    undo()
    assert 6 <= newest_complete(tmp_path / "output/tiny").progress.step < 24
    run.main(["--opt", path, "--resume", "dataloader.num_workers=0"])
    run.main(["--opt", path, "wandb.name=whole"])
    assert_same_run(tmp_path / "output/tiny", tmp_path / "output/whole")
