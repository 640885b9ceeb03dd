"""Untrusted and truncated files: reading them runs no code and gives an error that names the file."""

import os
import pickle

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from model.checkpoint import read_checkpoint
from model.weights import read_state
from utils.config.loading import load_options
from utils.errors import UserError
from utils.vision.images import open_image


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


@pytest.mark.parametrize(
    ("name", "write", "read"),
    [
        ("a.png", lambda path: Image.new("RGB", (64, 64), "red").save(path), open_image),
        ("a.jpg", lambda path: Image.effect_noise((64, 64), 50).save(path), open_image),
        ("a.ckpt", lambda path: torch.save({"state_dict": {"a": torch.ones(999)}}, path), read_checkpoint),
        ("a.pth", lambda path: torch.save({"a": torch.ones(999)}, path), read_state),
        ("a.safetensors", lambda path: save_file({"a": torch.ones(999)}, path), read_state),
        ("a.json", lambda path: path.write_text('{"train": {"epoch": 3}}'), load_options),
    ],
)
@pytest.mark.parametrize("kept", [0, 0.5])
def test_truncated_file__is_named(name, write, read, kept, tmp_path):
    path = tmp_path / name
    write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=name):
        read(path)
