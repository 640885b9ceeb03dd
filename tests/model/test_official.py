"""The published backbones: the table, the download, and what is checked."""

import hashlib
import http.server
import threading
from dataclasses import replace

import pytest
import torch

import eval as evaluation
from model.official import BACKBONES, official_backbone, official_file
from model.pretrained import backbone_spec
from utils.errors import UserError
from utils.options import PATCHES, WIDTH_AND_HEADS

SMALL = replace(BACKBONES[0], sha256=None)


@pytest.fixture
def server(tmp_path):
    """An HTTP server on 127.0.0.1 for the files of a folder; gives its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


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


def test_list_backbones__prints_names_and_options(hub, capsys):
    hub.mkdir(parents=True)
    (hub / "dino_deitsmall16_pretrain.pth").touch()
    assert evaluation.main(["--list-backbones"]) == []
    told = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in told.splitlines() if line.startswith("|")}
    for backbone in BACKBONES:
        part = told.split(f"\n\n{backbone.name}\n")[1].split("\n\n")[0]
        for word in (backbone.address, backbone.options, backbone.sha256 or "names and shapes"):
            assert word in part
    assert [cell.strip() for cell in rows["DINO ViT-S/16"].split("|")[2:-1]] == [
        "16",
        "384",
        "12",
        "0",
        "yes",
    ]
    assert rows["DINO ViT-B/16"].endswith(" no |")


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


def test_official__downloads_once_and_checks_the_digest(server, hub):
    folder, address = server
    torch.save({"a": torch.ones(3)}, folder / "dino.pth")
    digest = hashlib.sha256((folder / "dino.pth").read_bytes()).hexdigest()
    backbone = replace(SMALL, address=f"{address}/dino.pth", sha256=digest)
    assert official_file(backbone) == hub / "dino.pth"
    (folder / "dino.pth").unlink()
    assert official_file(backbone) == hub / "dino.pth"  # from the cache


def test_official__cached_file_is_checked_too(hub):
    hub.mkdir(parents=True)
    (hub / "dino.pth").write_bytes(b"truncated")
    with pytest.raises(UserError, match="delete it"):
        official_file(replace(SMALL, address="http://127.0.0.1:9/dino.pth", sha256="0" * 64))


def test_official__wrong_digest_leaves_nothing_behind(server, hub):
    folder, address = server
    (folder / "dino.pth").write_bytes(b"other bytes")
    with pytest.raises(UserError, match="damaged on the way"):
        official_file(replace(SMALL, address=f"{address}/dino.pth", sha256="0" * 64))
    assert list(hub.iterdir()) == []


def test_official__no_network_says_which_file_goes_where(hub):
    with pytest.raises(UserError) as error:
        official_file(replace(SMALL, address="http://127.0.0.1:9/dino_vitbase8_pretrain.pth"))
    assert str(hub / "dino_vitbase8_pretrain.pth") in str(error.value)
    assert "model.pretrained.pretrained_weights" in str(error.value)
