"""The published backbones: the table, the download, and what is checked."""

import hashlib
import io
from dataclasses import replace

import pytest
import torch

from model import official
from model.official import BACKBONES, official_backbone, official_file
from model.weights import backbone_spec
from tests.utils.download.server import Fault, Page, serving
from utils.config.options import PATCHES, WIDTH_AND_HEADS
from utils.download.transfer import Patience
from utils.errors import UserError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_table__has_every_backbone_that_options_can_ask_for():
    for arch, patches in PATCHES.items():
        for patch in patches:
            for model_type in WIDTH_AND_HEADS:
                for registers in {False, arch == "dinov2"}:
                    found = official_backbone(arch, model_type, patch, registers=registers)
                    assert (found.arch, found.patch, found.registers) == (arch, patch, registers)
    assert len({backbone.address for backbone in BACKBONES}) == len(BACKBONES)


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone.name)
def test_options__of_the_table_choose_that_backbone(tiny_options, backbone):
    chosen = dict(word.split("=") for word in backbone.options.split())
    typed = {
        key: {"true": True}.get(value, int(value) if value.isdecimal() else value)
        for key, value in chosen.items()
    }
    side = backbone.patch * 4
    options = tiny_options(
        dataset__res=side, dataset__val_res=side, **{k.replace(".", "__"): v for k, v in typed.items()}
    )
    assert backbone_spec(options).official is backbone


@pytest.fixture
def served():
    """A server with dino.pth, and a backbone whose file that is."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(30_000)}, buffer)
    with serving() as server:
        server.pages["dino.pth"] = Page(buffer.getvalue())
        yield server, replace(BACKBONES[0], address=f"{server.address}/dino.pth")


def test_official__downloads_once_and_checks_the_digest(served, hub):
    server, backbone = served
    body = server.pages["dino.pth"].body
    backbone = replace(backbone, sha256=hashlib.sha256(body).hexdigest())
    assert official_file(backbone) == hub / "dino.pth"
    assert (hub / "dino.pth").read_bytes() == body
    assert official_file(backbone) == hub / "dino.pth"  # from the cache
    assert server.bodies() == ["dino.pth"]


def test_official__cached_file_is_checked_too(hub):
    hub.mkdir(parents=True)
    (hub / "dino.pth").write_bytes(b"truncated")
    with pytest.raises(UserError, match="delete it"):
        official_file(replace(BACKBONES[0], address="http://127.0.0.1:9/dino.pth", sha256="0" * 64))


def test_official__wrong_digest_leaves_nothing_behind(served, hub):
    _, backbone = served
    with pytest.raises(UserError, match=r"its SHA-256 is .*, must be 000"):
        official_file(replace(backbone, sha256="0" * 64))
    assert list(hub.iterdir()) == []


def test_official__cut_download_is_never_under_the_final_name(served, hub, monkeypatch):
    """Nothing tells the digest of DINO's files, so a cut must not go unnoticed."""
    server, backbone = served
    monkeypatch.setattr(official, "PATIENCE", Patience(tries=2, sleep=lambda seconds: None))
    server.faults["dino.pth"] = [Fault(cut=50_000), Fault(cut=1), Fault(cut=1)]
    with pytest.raises(UserError, match=rf"cut after .* bytes.*put it at {hub}"):
        official_file(backbone)
    assert not (hub / "dino.pth").exists()
    server.faults.clear()
    assert official_file(backbone).read_bytes() == server.pages["dino.pth"].body  # goes on where it was
    assert [path.name for path in hub.iterdir()] == ["dino.pth"]


def test_official__no_network_says_which_file_goes_where(hub, monkeypatch):
    monkeypatch.setattr(official, "PATIENCE", Patience(tries=1))
    with pytest.raises(UserError) as error:
        official_file(replace(BACKBONES[0], address="http://127.0.0.1:9/dino_vitbase8_pretrain.pth"))
    assert str(hub / "dino_vitbase8_pretrain.pth") in str(error.value)
    assert "model.pretrained.pretrained_weights" in str(error.value)
