"""The download program, against miniature archives on a local server."""

import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from dataset.cocostuff import CocoStuff
from dataset.dataset_download import main
from dataset.potsdam import Potsdam
from tests.dataset import miniatures
from tests.utils.server import coco_pages, serving, targets_at, zipped
from utils.config.options import DatasetOptions
from utils.errors import UserError
from utils.files import REPOSITORY, exclusive

PROGRAM = [sys.executable, str(REPOSITORY / "dataset/dataset_download.py")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """All archives and lists of the table, in miniature."""
    coco = miniatures.make_cocostuff(tmp_path_factory.mktemp("coco"))
    potsdam = miniatures.make_potsdam(tmp_path_factory.mktemp("potsdam"))
    found = coco_pages(coco)
    found["cocostuff.zip"] = zipped(coco, below="cocostuff/")
    found["potsdamraw.zip"] = zipped(potsdam / "processed", below="potsdamraw/processed/")
    shutil.rmtree(potsdam / "processed")
    found["potsdam.zip"] = zipped(potsdam, below="potsdam/")
    return found


@pytest.fixture
def server(pages):
    with serving() as server:
        server.pages.update(pages)
        yield server


@pytest.fixture
def download(server, tmp_path):
    """Runs the program in this process, with the server's addresses."""

    def download(name, *flags):
        main([name, "--root", str(tmp_path / "data"), *flags], targets=targets_at(server))

    return download


def tree(folder):
    return sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.suffix not in (".lock", ".holder")
    )


def options(data_type, folder):
    return DatasetOptions(data_type=data_type, data_path=str(folder))


def test_cocostuff__end_to_end(download, server, tmp_path, capsys):
    download("cocostuff")
    root = tmp_path / "data"
    assert tree(root) == tree(miniatures.make_cocostuff(tmp_path / "expected"))
    for data_type in ("cocostuff27", "cocostuff15", "cocostuff3"):
        for split in ("train", "val"):
            assert np.asarray(CocoStuff(options(data_type, root), split).read(2).label).max() == 255
    said = capsys.readouterr().out
    assert f"{root}: cocostuff is complete" in said
    assert f"python dataset/crop_datasets.py --opt cocostuff.json --data_path {root}" in said
    assert f"python run.py --opt cocostuff.json --data_path {root}" in said
    server.seen.clear()
    download("cocostuff")  # a no-op
    assert server.seen == []
    with exclusive(root / "download"), pytest.raises(UserError, match="data/download is in use by process"):
        download("cocostuff")


@pytest.mark.parametrize(("name", "splits"), [("potsdam", ("train", "val")), ("potsdamraw", ("train",))])
def test_potsdam__end_to_end(download, tmp_path, capsys, name, splits):
    download(name)
    for split in splits:
        source = Potsdam(options(name, tmp_path / "data"), split)
        assert len(source) == 2
        assert source.read(1).image.size == (200, 200)
    assert "python run.py --opt potsdam.json" in capsys.readouterr().out


def test_stopped_run__downloads_only_what_is_missing(download, server, tmp_path):
    download("cocostuff", "--keep-archives")
    shutil.rmtree(tmp_path / "data/images/val2017")  # unpacked again
    shutil.rmtree(tmp_path / "data/images/train2017")
    (tmp_path / "data/train2017.zip").unlink()  # downloaded again
    server.seen.clear()
    download("cocostuff")
    assert server.bodies() == ["train2017.zip"]


def test_fallback__published_archive(download, server, tmp_path, capsys):
    del server.pages["train2017.zip"]
    download("cocostuff")
    assert "train2017.zip: HTTP 404 Not Found" in capsys.readouterr().out
    assert len(CocoStuff(options("cocostuff27", tmp_path / "data"), "train")) == 3
    assert server.bodies()[-1] == "cocostuff.zip"


def test_all_addresses_fail__each_is_named(download, server, tmp_path):
    server.pages.clear()
    with pytest.raises(UserError) as error:
        download("potsdam", "--mirror", f"{server.address}/mirror/")
    for address in ("mirror/potsdam.zip", "potsdam.zip"):
        assert f"{server.address}/{address}: HTTP 404 Not Found" in str(error.value)
    assert f"put into {tmp_path / 'data'} by hand: potsdam.zip" in str(error.value)


def test_incomplete__is_named_with_what_to_do(download, tmp_path):
    download("potsdam")
    (tmp_path / "data/gt/2_10_0_1.mat").unlink()
    with pytest.raises(UserError, match=r"gt/2_10_0_1\.mat is missing(.|\n)*delete the folder or list"):
        download("potsdam")


def test_dry_run__prints_addresses_and_sizes_and_writes_nothing(download, server, tmp_path, capsys):
    download("cocostuff", "--dry-run")
    assert not (tmp_path / "data").exists()
    assert server.seen == []
    said = capsys.readouterr().out
    assert f"train2017.zip: about 19.3GB\n    {server.address}/train2017.zip" in said
    assert "only if that fails:\n  cocostuff.zip: about 21.0GB" in said


def test_cityscapes__says_what_to_fetch_then_unpacks_it(download, server, tmp_path, monkeypatch, capsys):
    """If the disk was full, also the rest of an archive of which enough is there to train on."""
    root, source = tmp_path / "data", miniatures.make_cityscapes(tmp_path / "source")
    with pytest.raises(UserError) as error:
        download("cityscapes")
    command = f"csDownload -d {root} leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip"
    assert command in str(error.value)
    for kind in ("leftImg8bit", "gtFine"):
        archive = zipped(source / kind, below=f"{kind}/")
        (root / f"{kind}_trainvaltest.zip").write_bytes(archive.body)
    plain = zipfile.ZipFile.extract

    def full(archive, member, folder):
        plain(archive, member, folder)
        if "val" in member.filename and "leftImg8bit/" in member.filename:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", full)
        with pytest.raises(OSError, match="No space") as error:
            download("cityscapes")
    assert error.value.filename.startswith(f"{root}/leftImg8bit/val/")
    download("cityscapes")
    assert server.seen == []
    assert "cityscapes, val: 2 images" in capsys.readouterr().out
    assert tree(root) == tree(source)


def test_program__as_a_file_from_another_folder(server, tmp_path):
    root = tmp_path / "data"
    command = [*PROGRAM, "potsdam", "--root", str(root), "--mirror", server.address]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "potsdam is complete" in done.stdout
    assert server.bodies() == ["potsdam.zip"]
