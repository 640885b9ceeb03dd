"""Untrusted and truncated files: reading them runs no code and gives an error that names the file."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint import read_checkpoint
from model.weights import read_state
from utils.errors import UserError


class MakesFolder:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("read", [read_checkpoint, read_state])
def test_weights__run_no_code(read, form, tmp_path):
    path, made = tmp_path / "evil.pth", tmp_path / "made"
    if form == "plain":
        path.write_bytes(pickle.dumps(MakesFolder(made)))
    else:
        torch.save({"teacher": MakesFolder(made)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"evil\.pth.*(it contains posix\.mkdir|damaged)"):
        read(path)
    assert not made.exists()


@pytest.mark.parametrize("save", [torch.save, save_file])
@pytest.mark.parametrize("kept", [0, 2000])
def test_weights__that_are_truncated_are_named(save, kept, tmp_path):
    path = tmp_path / ("a.safetensors" if save is save_file else "a.pth")
    save({"a": torch.ones(999)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=path.name):
        read_state(path)
