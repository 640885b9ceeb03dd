"""Reading every file before a run."""

import os
import signal
import sys

import numpy as np
import pytest

from dataset.verify import in_workers
from tests.dataset.files import SIZE, names, save
from utils.errors import UserError
from utils.files import read_json_object, write_json


@pytest.fixture
def damaged(directory):
    """Two of four train images and one of two validation images are wrong."""
    (directory / "imgs/train/1.jpg").write_bytes((directory / "imgs/train/1.jpg").read_bytes()[:700])
    label = np.zeros((SIZE[1], SIZE[0]))
    label[1, 0] = 7  # a pixel that resizing drops
    save(directory / "labels/train/2.png", label)
    save(directory / "labels/val/0.png", np.zeros((5, 5)))
    return directory


@pytest.mark.parametrize("workers", [0, 2])
def test_check__names_every_damaged_file(data_of, damaged, workers):
    with pytest.raises(UserError, match="3 of 6 images or labels are damaged") as error:
        data_of("directory", damaged, dataset__check_files=True, dataloader__num_workers=workers)
    for words in (
        "imgs/train/1.jpg: not a readable image",
        "labels/train/2.png: the label holds [7], must hold only [0, 1, 2, 255]",
        "labels/val/0.png: label is (5, 5) (width, height), its image is (60, 44)",
        "dataset.skip_damaged=true",
    ):
        assert words in str(error.value)


def test_skip__odd_files_and_names_that_are_not_utf_8(data_of, directory, tmp_path_factory, capsys):
    """They are skipped or used; the digest, the inventory and the messages contain them."""
    sys.stdout.reconfigure(errors="backslashreplace")  # as `guarded` does
    folder = tmp_path_factory.mktemp("odd")
    odd = directory.rename(folder / os.fsdecode(b"caf\xe9"))
    (odd / "imgs/train/1.jpg").rename(odd / "imgs/train" / os.fsdecode(b"\xe9.jpg"))
    (odd / "imgs/train/loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(odd / "imgs/train/pipe.jpg")
    data = data_of("directory", odd, dataset__skip_damaged=True)
    assert len(data.train_set) == 4
    assert len(data.train_set.source.digest()) == 64
    write_json(folder / "inventory.json", data.inventory())
    assert os.fsdecode(b"imgs/train/\xe9.jpg") in read_json_object(folder / "inventory.json")["train"]
    assert "loop.jpg: not a readable image" in capsys.readouterr().out


def test_check__reads_unchanged_files_once(data_of, directory, monkeypatch):
    data_of("directory", directory, dataset__check_files=True)
    (directory / "imgs/val/0.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 6 images or labels are damaged"):
        data_of("directory", directory, dataset__check_files=True)
    monkeypatch.setattr("dataset.verify.DataLoader", None)  # needed to read them again
    with pytest.raises(UserError, match="1 of 6 images or labels are damaged"):
        data_of("directory", directory, dataset__check_files=True)


def test_skip__leaves_out_and_lists(data_of, damaged, capsys):
    with pytest.raises(UserError, match="only 2 train items"):
        data_of("directory", damaged, dataset__skip_damaged=True, dataloader__batch_size=3)
    data = data_of("directory", damaged, dataset__skip_damaged=True)
    assert [len(data.train_set), len(data.validation_set), len(data.damaged)] == [2, 1, 3]
    assert names(data.train_set) == ["0.jpg", "3.jpg"]
    assert data.train_labelled
    assert data.validation_labelled
    assert "3 of 6 images or labels are damaged and skipped" in capsys.readouterr().out
    for item in [*data.train_set, *data.validation_set]:
        assert item.image.shape == (3, 32, 32)


@pytest.mark.parametrize("kind", ["five", "random"])
def test_skip__does_not_move_the_crops_of_other_images(data_of, directory, kind):
    whole = data_of("directory", directory, dataset__crop_type=kind)
    expected = [whole.train_set[5 * 3 + k].image for k in range(5)]
    (directory / "imgs/train/1.jpg").write_bytes(b"")
    data = data_of("directory", directory, dataset__crop_type=kind, dataset__skip_damaged=True)
    assert len(data.train_set) == 15
    assert all((data.train_set[5 * 2 + k].image == expected[k]).all() for k in range(5))


def test_skip__missing_files_of_a_list(data_of, coco):
    (coco / "images/train2017/000000000001.jpg").unlink()
    data = data_of("cocostuff27", coco, dataset__skip_damaged=True)
    assert len(data.train_set) == 2
    assert "000000000001.jpg" in data.damaged[0]


@pytest.mark.skipif(sys.platform != "linux", reason="the worker is forked")
def test_in_workers__a_killed_worker_is_one_message():
    with pytest.raises(UserError, match="a worker process was killed"):
        in_workers(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(2), workers=1)
