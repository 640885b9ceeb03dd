"""The published backbones and weights files: the table, the download, and what is read from a file."""

import hashlib
import io
from argparse import Namespace
from dataclasses import replace
from itertools import product

import pytest
import torch

from model.backbone import FrozenViT
from model.weights import BACKBONES, SHA256, backbone_spec, clean_state, load_backbone, published_file
from tests.utils.server import Fault, Page, serving
from utils import download
from utils.config.options import PATCHES, WIDTH_AND_HEADS
from utils.errors import UserError

NAME = next(iter(BACKBONES))


@pytest.fixture
def spec(tiny_options):
    return backbone_spec(tiny_options())


def random_state(spec):
    drawn = torch.Generator().manual_seed(0)
    state = FrozenViT(spec).state_dict()
    return {name: torch.randn(value.shape, generator=drawn) for name, value in state.items()}


def load(spec, path):
    backbone = FrozenViT(spec)
    load_backbone(backbone, str(path))
    return backbone.state_dict()


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
@pytest.mark.parametrize("wrapper", [None, "teacher", "target_encoder"])
def test_load__bare_or_in_a_training_checkpoint_of_dino_or_msn(spec, tmp_path, prefix, wrapper):
    state = random_state(spec)
    stored = {prefix + name: value for name, value in state.items()}
    stored |= {f"{prefix}{head}.weight": torch.ones(2) for head in ("head", "fc.fc1")}  # DINO's and MSN's
    training = {"epoch": 100, "args": Namespace(arch="vit_small", lr=5e-4)}
    torch.save(stored if wrapper is None else {wrapper: stored} | training, tmp_path / "w.pth")
    assert all(torch.equal(value, state[name]) for name, value in load(spec, tmp_path / "w.pth").items())


def test_clean_state__chunks_mask_token_and_depth():
    one = torch.ones(1)
    state = {
        "mask_token": one, "dino_head.mlp": one, "blocks.0.0.norm1.weight": one,
        "blocks.1.7.norm1.weight": one, "blocks.1.8.norm1.weight": one, "norm.weight": one,
    }  # fmt: skip
    assert set(clean_state(state, 8)) == {"blocks.0.norm1.weight", "blocks.7.norm1.weight", "norm.weight"}


def test_load__file_that_does_not_fit_names_blocks_keys_and_shapes(spec, tmp_path):
    state = random_state(spec)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"depth is 3, must be at most 2, the number of blocks in .*w\.pth"):
        load(replace(spec, depth=3), tmp_path / "w.pth")
    del state["norm.weight"]
    torch.save(state | {"pos_embed": state["pos_embed"][:, :5], "surplus": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        load(spec, tmp_path / "w.pth")
    for part in ("w.pth", "pos_embed", "[1, 5, 24]", "[1, 17, 24]", "norm.weight", "surplus"):
        assert part in str(error.value)
    torch.save(random_state(replace(spec, dim=12, depth=3)), tmp_path / "w.pth")
    sides = r"w\.pth \(width 12, 3 blocks\) does not fit the options \(width 24, 2 blocks\)"
    with pytest.raises(UserError, match=rf"{sides}.*; and \d+ more$"):
        load(spec, tmp_path / "w.pth")


def test_table__has_every_backbone_that_options_can_choose(tiny_options):
    found = set()
    for arch, model_type, registers in product(PATCHES, WIDTH_AND_HEADS, (False, True)):
        for patch in PATCHES[arch] if arch == "dinov2" or not registers else ():
            options = tiny_options(
                model__arch=arch, model__dim=WIDTH_AND_HEADS[model_type][0],
                dataset__res=4 * patch, dataset__val_res=4 * patch,
                model__pretrained__model_type=model_type, model__pretrained__dino_patch_size=patch,
                model__pretrained__registers=registers,
            )  # fmt: skip
            found.add(backbone_spec(options).published)
    assert found == set(BACKBONES)
    assert len(set(BACKBONES.values())) == len(BACKBONES)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(monkeypatch):
    """A server with dino.pth, the file of backbone NAME."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(30_000)}, buffer)
    with serving() as server:
        server.pages["dino.pth"] = Page(buffer.getvalue())
        monkeypatch.setitem(BACKBONES, NAME, f"{server.address}/dino.pth")
        yield server


def test_published__downloads_once_and_checks_the_digest(server, hub, monkeypatch):
    body = server.pages["dino.pth"].body
    monkeypatch.setitem(SHA256, "dino.pth", hashlib.sha256(body).hexdigest())
    assert published_file(NAME) == published_file(NAME) == hub / "dino.pth"
    assert server.bodies() == ["dino.pth"]
    (hub / "dino.pth").write_bytes(body[:-1] + b"x")
    with pytest.raises(UserError, match=r"dino\.pth: its SHA-256 is not .*; delete it"):
        published_file(NAME)


def test_published__cut_download_never_has_the_final_name(server, hub, monkeypatch):
    """The DINO files have no known digest, so a cut must not go unnoticed."""
    server.faults["dino.pth"] = [Fault(cut=70_000), Fault(cut=1), Fault(cut=1)]
    monkeypatch.setattr(download, "TRIES", 2)
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    with pytest.raises(UserError, match=rf"save it as {hub}.*pretrained_weights.*Connection broken"):
        published_file(NAME)
    assert not (hub / "dino.pth").exists()
    server.faults.clear()
    assert published_file(NAME).read_bytes() == server.pages["dino.pth"].body  # resumed
    assert server.seen[-1][1] == 70_002
