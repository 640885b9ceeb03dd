import pytest

from utils.files import replacing


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
