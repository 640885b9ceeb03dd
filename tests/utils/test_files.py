import os

import pytest

from utils.errors import UserError
from utils.files import exclusive, make_folder, move_aside, read_json_object, replacing, write_json


@pytest.mark.parametrize("fails", [False, True])
def test_replacing__new_file_or_the_old_one(tmp_path, fails):
    path = tmp_path / "a.txt"
    path.write_text("old")
    try:
        with replacing(path, sync=True) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
            if fails:
                raise OSError("full")
    except OSError:
        assert fails
    assert path.read_text() == ("old" if fails else "new")
    assert list(tmp_path.iterdir()) == [path]


def test_write_json__is_standard_json(tmp_path):
    write_json(tmp_path / "m.json", {"a": float("nan"), "b": (1, 2), "c": {"d": float("inf")}})
    assert read_json_object(tmp_path / "m.json") == {"a": None, "b": [1, 2], "c": {"d": None}}


def test_move_aside__keeps_every_earlier_run(tmp_path):
    run = tmp_path / "run"
    for number in (1, 2):
        run.mkdir()
        (run / "best.ckpt").write_text(str(number))
        assert move_aside(run) == tmp_path / f"run.{number}"
    assert [(tmp_path / f"run.{n}/best.ckpt").read_text() for n in (1, 2)] == ["1", "2"]
    assert move_aside(run) is None


def test_exclusive__names_the_holder_and_the_lock(tmp_path):
    path = tmp_path / "data"
    words = rf"{path} is in use by process {os.getpid()} on .*\.data\.lock"
    for _ in range(2):
        with exclusive(path, advice=""), pytest.raises(UserError, match=words), exclusive(path, advice=""):
            pass


def test_make_folder__that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another output_dir"):
        make_folder(tmp_path / "file" / "run")
