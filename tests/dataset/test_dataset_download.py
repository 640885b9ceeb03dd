"""The downloader from its command line, against miniature archives on a local server."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dataset import cocostuff
from dataset.cocostuff import CocoStuff
from dataset.dataset_download import main
from dataset.potsdam import Potsdam
from tests.utils.download.server import Fault, Page, serving, targets_at
from utils.config.options import DatasetOptions
from utils.download import archives, layout
from utils.download.sources import TARGETS, Archive
from utils.download.transfer import Patience
from utils.errors import Interrupted, UserError

REPOSITORY = Path(__file__).resolve().parents[2]
IDS = ("000000000139", "000000000285", "000000000632")
COMMANDS = {
    "file": [sys.executable, str(REPOSITORY / "dataset/dataset_download.py")],
    "module": [sys.executable, "-m", "dataset.dataset_download"],
}


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def encoded(array, kind):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def mat(**entries):
    buffer = io.BytesIO()
    savemat(buffer, entries)
    return buffer.getvalue()


def coco_files():
    """Three images a split, in the final layout."""
    photo = encoded(np.full((8, 12, 3), 90, dtype=np.uint8), "JPEG")
    label = encoded(np.full((8, 12), 181, dtype=np.uint8), "PNG")
    files = {name: "\n".join(IDS).encode() + b"\n" for name in layout.COCO_LISTS}
    for split in layout.COCO_SPLITS:
        files |= {f"images/{split}/{name}.jpg": photo for name in IDS}
        files |= {f"annotations/{split}/{name}.png": label for name in IDS}
    return files


def potsdam_files(prefix):
    files = {}
    for name in ("2_10_0_0", "2_10_0_1"):
        files[f"{prefix}imgs/{name}.mat"] = mat(img=np.full((200, 200, 4), 7, dtype=np.uint8))
        files[f"{prefix}gt/{name}.mat"] = mat(gt=np.full((200, 200), 5, dtype=np.uint8))
    return files


def pages():
    """What a mirror holds: every archive and list of the table, in miniature."""
    coco = coco_files()
    below = {folder: {k: v for k, v in coco.items() if k.startswith(folder)} for folder in ("images", "ann")}
    lists = dict.fromkeys(
        ("potsdam/labelled_train.txt", "potsdam/labelled_test.txt"), b"2_10_0_0\n2_10_0_1\n"
    )
    zips = {
        "cocostuff.zip": {f"cocostuff/{name}": content for name, content in coco.items()},
        "stuffthingmaps_trainval2017.zip": {k.split("/", 1)[1]: v for k, v in below["ann"].items()},
        "potsdam.zip": potsdam_files("potsdam/") | lists,
        "potsdamraw.zip": potsdam_files("potsdamraw/processed/"),
    }
    for split in layout.COCO_SPLITS:
        images = {k.split("/", 1)[1]: v for k, v in below["images"].items() if split in k}
        zips[f"{split}.zip"] = images
    found = {name: Page(zipped(files)) for name, files in zips.items()}
    return found | {name: Page(coco[name]) for name in layout.COCO_LISTS}


@pytest.fixture
def server():
    with serving() as server:
        server.pages.update(pages())
        yield server


@pytest.fixture
def targets(server):
    return targets_at(server)


def set_free(monkeypatch, free):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))


@pytest.fixture
def download(targets, tmp_path, monkeypatch):
    set_free(monkeypatch, 10**13)  # whatever this machine's disk holds

    def download(name, *flags):
        patience = Patience(tries=3, timeout=5.0, sleep=lambda seconds: None)
        main([name, "--root", str(tmp_path / "data"), *flags], targets=targets, patience=patience)

    return download


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def options(data_type, folder):
    return DatasetOptions(data_type=data_type, data_path=str(folder))


def test_cocostuff__end_to_end(download, server, tmp_path, capsys):
    download("cocostuff")
    root = tmp_path / "data"
    assert tree(root) == sorted([*coco_files(), "download.json"])
    for data_type in ("cocostuff27", "cocostuff15", "cocostuff3"):
        for split in ("train", "val"):
            source = CocoStuff(options(data_type, root), split)
            assert len(source) == 3
            assert np.asarray(source.read(2).label)[0, 0] == 181
    out = capsys.readouterr().out
    assert "train2017.zip: removed, as it is unpacked" in out
    assert f"python dataset/crop_datasets.py --opt cocostuff.json --data_path {root}" in out
    assert f"python run.py --opt cocostuff.json --data_path {root}" in out
    record = json.loads((root / "download.json").read_text())
    archive = server.pages["train2017.zip"]
    assert record["files"]["train2017.zip"]["size"] == len(archive.body)
    assert record["files"]["train2017.zip"]["etag"] == archive.etag
    assert record["files"]["train2017.zip"]["address"] == f"{server.address}/train2017.zip"
    assert record["unpacked"]["train2017.zip"]["folders"] == {"train2017": 3}
    assert len(record["files"]) == 8


@pytest.mark.parametrize(
    ("name", "splits", "folder"),
    [("potsdam", ("train", "val"), "."), ("potsdamraw", ("train",), "processed")],
)
def test_potsdam__end_to_end(download, tmp_path, capsys, name, splits, folder):
    download(name)
    root = tmp_path / "data"
    for split in splits:
        source = Potsdam(options(name, root), split)
        assert len(source) == 2
        assert source.read(1).image.size == (200, 200)
    assert (root / folder / "gt/2_10_0_0.mat").is_file()
    assert "python run.py --opt potsdam.json" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--keep-archives",)])
def test_second_run__does_nothing(download, server, tmp_path, capsys, flags):
    download("cocostuff", *flags)
    before = {name: (tmp_path / "data" / name).stat().st_mtime_ns for name in tree(tmp_path / "data")}
    server.seen.clear()
    capsys.readouterr()
    download("cocostuff", *flags)
    assert "complete already, nothing to do" in capsys.readouterr().out
    assert server.seen == []
    after = {name: (tmp_path / "data" / name).stat().st_mtime_ns for name in tree(tmp_path / "data")}
    assert before == after
    assert ("data/train2017.zip" in tree(tmp_path)) == bool(flags)


def test_keep_archives__removed_image_comes_back_without_the_network(download, server, tmp_path):
    download("cocostuff", "--keep-archives")
    (tmp_path / "data/images/val2017" / f"{IDS[1]}.jpg").unlink()
    server.seen.clear()
    download("cocostuff", "--keep-archives")
    assert server.bodies() == []
    assert (tmp_path / "data/images/val2017" / f"{IDS[1]}.jpg").is_file()


def test_removed_images__only_their_archive_is_fetched_again(download, server, tmp_path):
    download("cocostuff")
    shutil.rmtree(tmp_path / "data/images/val2017")
    server.seen.clear()
    download("cocostuff")
    assert server.bodies() == ["val2017.zip"]


def test_stopped_run__goes_on_where_it_was(download, server, tmp_path, monkeypatch):
    server.faults["val2017.zip"] = [Fault(cut=700)]

    def stop(self, failures):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Patience, "wait", stop)
        with pytest.raises(Interrupted, match=r"\.part\), the same command goes on"):
            download("cocostuff")
    assert (tmp_path / "data/val2017.zip.part").stat().st_size == 700
    server.seen.clear()
    download("cocostuff")
    assert server.bodies() == ["val2017.zip", "train2017.zip"]
    assert ("GET", "val2017.zip", 700) in server.seen


def test_kill__in_the_middle_then_go_on(server, tmp_path):
    """SIGKILL while a body is on its way: nothing of ours gets to tidy up."""
    root = tmp_path / "data"
    server.faults["potsdam.zip"] = [Fault(cut=900, hang=True)]
    command = [*COMMANDS["file"], "potsdam", "--root", str(root), "--mirror", server.address]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    part, until = root / "potsdam.zip.part", time.monotonic() + 20
    while not (part.is_file() and part.stat().st_size >= 900) and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert part.stat().st_size == 900
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert server.seen[-1] == ("GET", "potsdam.zip", 900)
    assert layout.check_potsdam(root).counts == {"labelled_train.txt": 2, "labelled_test.txt": 2}


def test_stopped_unpacking__goes_on_where_it_was(download, server, tmp_path, monkeypatch, capsys):
    extract, done = archives._extract, []

    def stop_at_the_third(*arguments, **more):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(extract(*arguments, **more))

    with monkeypatch.context() as patched:
        patched.setattr(archives, "_extract", stop_at_the_third)
        with pytest.raises(Interrupted):
            download("potsdamraw")
    server.seen.clear()
    download("potsdamraw")
    assert server.seen == []
    assert "unpacked 4 files, 2 of them there already" in capsys.readouterr().out


def test_fallback__published_archive(download, server, tmp_path, capsys):
    del server.pages["stuffthingmaps_trainval2017.zip"]
    download("cocostuff")
    out = capsys.readouterr().out
    assert "stuffthingmaps_trainval2017.zip: answers 404 Not Found" in out
    assert "going on with the published archive: cocostuff.zip" in out
    assert len(CocoStuff(options("cocostuff27", tmp_path / "data"), "val")) == 3
    assert "train2017.zip" not in server.bodies()


def test_all_sources_fail__each_is_named_and_what_to_do(download, server, tmp_path):
    server.pages.clear()
    with pytest.raises(UserError) as error:
        download("cocostuff", "--mirror", f"{server.address}/mirror/")
    message = str(error.value)
    first = layout.COCO_LISTS[0]
    for address in (f"mirror/{first}", first, "mirror/cocostuff.zip", "cocostuff.zip"):
        assert f"{server.address}/{address}: answers 404 Not Found" in message
    assert f"fetch by hand into {tmp_path / 'data'}: {first}, " in message
    assert "train2017.zip or cocostuff.zip" in message
    assert tree(tmp_path / "data") == []


def test_mirror__comes_first(download, server, targets):
    server.pages |= {f"mirror/{name}": page for name, page in server.pages.items()}
    download("potsdam", "--mirror", f"{server.address}/mirror")
    assert server.bodies() == ["mirror/potsdam.zip"]


def test_by_hand__archive_is_unpacked_without_the_network(download, server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cocostuff.zip").write_bytes(server.pages["cocostuff.zip"].body)
    download("cocostuff")
    assert server.seen == []
    assert not (tmp_path / "data/cocostuff.zip").exists()


def test_by_hand__whole_data_set_is_left_alone(download, server, tmp_path, capsys):
    for name, content in coco_files().items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    download("cocostuff")
    assert "nothing to do" in capsys.readouterr().out
    assert server.seen == []


def test_by_hand__archive_beside_a_whole_data_set_is_unpacked_and_no_other_fetched(
    download, server, tmp_path, capsys
):
    for name, content in coco_files().items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    (tmp_path / "data/val2017.zip").write_bytes(server.pages["val2017.zip"].body)
    download("cocostuff")
    assert "val2017.zip: unpacked 3 files, 3 of them there already" in capsys.readouterr().out
    assert server.seen == []


def test_damaged_archive__is_named_and_fetched_again_once_deleted(download, server, tmp_path):
    whole = server.pages["potsdam.zip"]
    at = whole.body.index(b"MATLAB")
    server.pages["potsdam.zip"] = Page(whole.body[:at] + b"matlab" + whole.body[at + 6 :])
    with pytest.raises(UserError, match=r"2_10_0_0\.mat is damaged .*delete .*potsdam\.zip"):
        download("potsdam")
    server.pages["potsdam.zip"] = whole
    (tmp_path / "data/potsdam.zip").unlink()
    download("potsdam")


def test_incomplete__counted_and_the_first_named(download, server, tmp_path):
    label = f"val2017/{IDS[1]}.png"
    archive = zipfile.ZipFile(io.BytesIO(server.pages["stuffthingmaps_trainval2017.zip"].body))
    files = {name: archive.read(name) for name in archive.namelist() if name != label}
    server.pages["stuffthingmaps_trainval2017.zip"] = Page(zipped(files))
    with pytest.raises(UserError, match=rf"lacks 1 of 3 annotations, {IDS[1]}\.png first"):
        download("cocostuff")


def test_list__that_is_no_list(download, server, tmp_path):
    server.pages[layout.COCO_LISTS[0]] = Page(b"0 or so ids\n")
    with pytest.raises(UserError, match="holds '0', must hold image ids; delete it"):
        download("cocostuff")


def test_dry_run__writes_nothing(download, server, tmp_path, capsys):
    download("cocostuff", "--dry-run")
    assert not (tmp_path / "data").exists()
    assert server.bodies() == []
    out = capsys.readouterr().out
    size = len(server.pages["train2017.zip"].body)
    assert f"train2017.zip: {size / 1000:.1f} kB\n" in out
    assert f"from {server.address}/train2017.zip" in out
    assert f"unpacks train2017 into {tmp_path / 'data/images'}" in out
    assert "and only if that fails, instead:\n  cocostuff.zip: " in out


def test_dry_run__estimates_and_what_is_there(download, server, tmp_path, capsys):
    del server.pages["potsdam.zip"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/potsdam.zip.part").write_bytes(bytes(2000))
    download("potsdam", "--dry-run")
    out = capsys.readouterr().out
    assert "potsdam.zip: about 1.1 GB (an estimate), of which 2.0 kB are there" in out
    assert tree(tmp_path / "data") == ["potsdam.zip.part"]


def test_space__names_need_and_free(download, server, tmp_path, monkeypatch):
    set_free(monkeypatch, 1000)
    with pytest.raises(UserError, match=r"the data set, unpacked, needs .* kB, 1\.0 kB are free"):
        download("potsdam")
    assert server.bodies() == []


def test_space__counts_what_is_unpacked_already(download, server, tmp_path, monkeypatch):
    download("potsdam")
    (tmp_path / "data/labelled_test.txt").unlink()
    (tmp_path / "data/download.json").unlink()
    (tmp_path / "data/potsdam.zip").write_bytes(server.pages["potsdam.zip"].body)
    set_free(monkeypatch, 100)
    download("potsdam")
    assert (tmp_path / "data/labelled_test.txt").read_text() == "2_10_0_0\n2_10_0_1\n"


@pytest.fixture
def few_cityscapes(monkeypatch):
    monkeypatch.setattr(layout, "CITYSCAPES_COUNTS", {"train": 2, "val": 1})


def cityscapes_zip(kind, suffix, *, val=True):
    splits = {"train": ("ulm_000000_000019", "ulm_000001_000019"), "val": ("bonn_000000_000019",) * val}
    files = {"README": b"", "license.txt": b""}
    for split, names in splits.items():
        files |= {f"{kind}/{split}/{name[:4].rstrip('_')}/{name}_{suffix}.png": b"x" for name in names}
    return zipped(files)


def test_cityscapes__says_what_to_fetch_and_fails(download, server, tmp_path, capsys):
    with pytest.raises(UserError) as error:
        download("cityscapes")
    out = capsys.readouterr().out
    root = tmp_path / "data"
    assert f"csDownload -d {root} leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip" in out
    assert "must hold 2,975" in str(error.value)
    assert "must hold 500" in str(error.value)
    assert server.seen == []


def test_cityscapes__unpacks_and_checks(download, tmp_path, capsys, few_cityscapes):
    root = tmp_path / "data"
    root.mkdir()
    images = cityscapes_zip("leftImg8bit", "leftImg8bit")
    (root / "leftImg8bit_trainvaltest.zip").write_bytes(images)
    (root / "gtFine_trainvaltest.zip").write_bytes(cityscapes_zip("gtFine", "gtFine_labelIds", val=False))
    with pytest.raises(UserError, match=r"bonn: lacks 1 of 1 labels, bonn_000000_000019_gtFine_labelIds"):
        download("cityscapes", "--keep-archives")
    (root / "gtFine_trainvaltest.zip").write_bytes(cityscapes_zip("gtFine", "gtFine_labelIds"))
    shutil.rmtree(root / "gtFine")
    capsys.readouterr()
    download("cityscapes")
    assert not (root / "gtFine_trainvaltest.zip").exists()
    assert "cityscapes is complete" in capsys.readouterr().out
    download("cityscapes")
    assert "nothing to do" in capsys.readouterr().out


def test_command_line__mistakes_together(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        main(["cityscapes", "--root", str(tmp_path / "file"), "--mirror", "ftp://x"])
    assert len(error.value.mistakes) == 3


@pytest.mark.parametrize("form", COMMANDS)
def test_command__both_forms(server, tmp_path, form):
    """As a file from elsewhere, with a torch that cannot be imported; as a module from the project's root."""
    environment = dict(os.environ)
    if form == "file":
        (tmp_path / "torch.py").write_text("raise ImportError('torch is slow')")
        environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [*COMMANDS[form], "potsdam", "--root", str(tmp_path / "data"), "--mirror", server.address],
        cwd=tmp_path if form == "file" else REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "potsdam is complete" in done.stdout
    assert server.bodies() == ["potsdam.zip"]


def test_command__mistake_gives_two(tmp_path):
    command = [*COMMANDS["file"], "potsdam", "--root", str(tmp_path), "--mirror", "x"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 mistake in the command line:\n  - --mirror is x: must begin with")


def test_table__lists_are_those_that_the_source_reads():
    read = {f"curated/{split}2017/{name}" for (_, split), name in cocostuff.LISTS.items()}
    assert read == set(layout.COCO_LISTS)


def test_table__addresses_and_names():
    files = [file for target in TARGETS.values() for plan in target.plans for file in plan]
    for file in files:
        assert all(address.startswith(("http://", "https://")) for address in file.addresses)
        assert all(address.endswith(f"/{file.name}") for address in file.addresses)
        assert not isinstance(file, Archive) or file.wanted
