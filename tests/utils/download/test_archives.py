"""Unpacking archives that are whole, restarted, damaged and hostile."""

import random
import shutil
import stat
import struct
import zipfile
from collections import namedtuple

import pytest

from utils.download.archives import unpack
from utils.errors import UserError

FILES = {"set/imgs/a.jpg": b"a" * 5000, "set/imgs/b.jpg": bytes(range(256)), "set/list.txt": b"a\nb\n"}
WANTED = ("imgs", "list.txt")


def pack(path, files, *, modes=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.filename = name  # as given: ZipInfo mends some names
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (modes or {}).get(name, stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content)
    return path


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("prefix", ["", "set/"])
def test_unpack__wanted_part_at_the_top_or_one_down(tmp_path, prefix):
    files = {f"{prefix}{name.removeprefix('set/')}": content for name, content in FILES.items()}
    more = {"__MACOSX/x/imgs/._a.jpg": b"", f"{prefix}README": b"not wanted", f"{prefix}deep/er/imgs/c": b""}
    archive = pack(tmp_path / "a.zip", files | more)
    unpacked = unpack(archive, tmp_path / "out", wanted=WANTED)
    assert tree(tmp_path / "out") == {name.removeprefix("set/"): content for name, content in FILES.items()}
    assert unpacked.folders == {"imgs": 2, ".": 1}
    assert (unpacked.files, unpacked.size, unpacked.skipped) == (3, 5260, 0)


def test_unpack__only_what_is_missing_or_other(tmp_path):
    archive = pack(tmp_path / "a.zip", FILES)
    unpack(archive, tmp_path / "out", wanted=WANTED)
    (tmp_path / "out/list.txt").unlink()
    (tmp_path / "out/imgs/a.jpg").write_bytes(b"b" * 5000)  # same size, other CRC
    kept = (tmp_path / "out/imgs/b.jpg").stat().st_mtime_ns
    assert unpack(archive, tmp_path / "out", wanted=WANTED).skipped == 1
    assert (tmp_path / "out/imgs/a.jpg").read_bytes() == FILES["set/imgs/a.jpg"]
    assert (tmp_path / "out/imgs/b.jpg").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../evil", "leads out"),
        ("imgs/../../evil", "leads out"),
        ("/etc/evil", "absolute"),
        ("C:/evil", "absolute"),
        ("c:evil", "absolute"),
        ("imgs\\..\\evil", "backslash"),
    ],
)
def test_unpack__names_that_lead_out(tmp_path, name, why):
    archive = pack(tmp_path / "a.zip", {"imgs/good": b"x", name: b"evil"})
    with pytest.raises(UserError, match=why) as error:
        unpack(archive, tmp_path / "in/out", wanted=())
    assert repr(name) in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["a.zip"]  # nothing, not even the good one


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        (stat.S_IFLNK | 0o777, "a link"),
        (stat.S_IFIFO | 0o644, "neither a file nor a folder"),
        (stat.S_IFCHR | 0o644, "neither a file nor a folder"),
    ],
)
def test_unpack__links_and_special_files(tmp_path, mode, why):
    archive = pack(tmp_path / "a.zip", {"imgs/x": b"/etc/passwd"}, modes={"imgs/x": mode})
    with pytest.raises(UserError, match=why):
        unpack(archive, tmp_path / "out", wanted=("imgs",))
    assert not (tmp_path / "out").exists()


def test_unpack__two_members_of_one_name(tmp_path):
    archive = pack(tmp_path / "a.zip", {"imgs/x": b"1", "set/imgs/x": b"2"})
    with pytest.raises(UserError, match="'imgs/x': is in it 2 times"):
        unpack(archive, tmp_path / "out", wanted=("imgs",))


def test_unpack__declared_size_beyond_the_disk(tmp_path, monkeypatch):
    archive = pack(tmp_path / "a.zip", {"imgs/zeros": bytes(5_000_000)})
    assert archive.stat().st_size < 10_000
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 4_000_000))
    with pytest.raises(UserError, match=r"a\.zip unpacks to needs 5\.0 MB, 4\.0 MB are free"):
        unpack(archive, tmp_path / "out", wanted=())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("declared", [10, 6_000_000])
def test_unpack__size_other_than_declared(tmp_path, declared):
    archive = pack(tmp_path / "a.zip", {"imgs/zeros": bytes(5_000_000)})
    content = archive.read_bytes()  # file size stands at offset 24 of the central directory's entry
    at = content.index(b"PK\x01\x02") + 24
    archive.write_bytes(content[:at] + struct.pack("<I", declared) + content[at + 4 :])
    with pytest.raises(UserError, match="imgs/zeros is damaged"):
        unpack(archive, tmp_path / "out", wanted=())
    assert tree(tmp_path / "out") == {}


def test_unpack__damaged_member_is_named_and_the_rest_stays(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as opened:  # stored, so that a byte can be found and changed
        opened.writestr("imgs/a", b"first")
        opened.writestr("imgs/b", b"second")
    archive.write_bytes(archive.read_bytes().replace(b"second", b"sEcond", 1))
    with pytest.raises(UserError, match=r"a\.zip: imgs/b is damaged \(Bad CRC-32.*delete .*a\.zip and run"):
        unpack(archive, tmp_path / "out", wanted=())
    assert tree(tmp_path / "out") == {"imgs/a": b"first"}


@pytest.mark.parametrize("content", [b"", b"PK nonsense", None])
def test_unpack__no_whole_archive(tmp_path, content):
    archive = pack(tmp_path / "a.zip", FILES)
    archive.write_bytes(archive.read_bytes()[:-30] if content is None else content)
    with pytest.raises(UserError, match=r"a\.zip: not a whole zip archive"):
        unpack(archive, tmp_path / "out", wanted=())


def test_unpack__random_damage_never_leads_out_or_crashes(tmp_path):
    whole = pack(tmp_path / "a.zip", FILES).read_bytes()
    rng = random.Random(0)
    refused = 0
    for number in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 2, 5))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.zip").write_bytes(damaged)
        try:
            unpack(folder / "a.zip", folder / "in/out", wanted=())
        except UserError:
            refused += 1
        assert {path.relative_to(folder).parts[0] for path in folder.rglob("*")} <= {"a.zip", "in"}
        assert not (folder / "in").exists() or [path.name for path in (folder / "in").iterdir()] == ["out"]
    assert refused > 100


def test_unpack__nothing_that_is_wanted(tmp_path):
    archive = pack(tmp_path / "a.zip", FILES)
    with pytest.raises(UserError, match="holds none of other"):
        unpack(archive, tmp_path / "out", wanted=("other",))


def test_unpack__encrypted(tmp_path):
    archive = pack(tmp_path / "a.zip", {"imgs/x": b"1"})
    content = archive.read_bytes()
    at = content.index(b"PK\x01\x02") + 8
    archive.write_bytes(content[:at] + b"\x01\x00" + content[at + 2 :])
    with pytest.raises(UserError, match="is encrypted"):
        unpack(archive, tmp_path / "out", wanted=())
