import json

import pytest

from utils.errors import UserError
from utils.files import make_folder, move_aside, replacing, write_json


def test_replacing__new_content_under_the_old_name(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("begun", [True, False])
def test_replacing__failure_leaves_the_old_file_alone(tmp_path, begun):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with replacing(path) as temporary:
            if begun:
                temporary.write_text("n")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_json__is_standard_json(tmp_path):
    write_json(tmp_path / "m.json", {"a": float("nan"), "b": (1, 2), "c": {"d": float("inf")}})
    text = (tmp_path / "m.json").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert found == {"a": None, "b": [1, 2], "c": {"d": None}}


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
