"""Downloads from a server that cuts, hangs, lies and changes its files; and archives, whole and damaged."""

import hashlib
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple

import pytest

from tests.utils.server import Fault, Page, serving
from utils.download import DownloadError, download, extract
from utils.errors import UserError
from utils.files import REPOSITORY, exclusive

BODY = b"PK" + bytes(range(256)) * 400
OTHER = b"PK" + bytes(reversed(range(256))) * 500
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    with serving() as server:
        server.pages["a.zip"] = Page(BODY)
        yield server


@pytest.fixture
def get(server, tmp_path):
    """Downloads a.zip, quickly."""

    def get(*names, timeout=5.0, tries=4, **known):
        urls = [f"{server.address}/{name}" for name in names or ("a.zip",)]
        download(urls, tmp_path / "a.zip", timeout=timeout, tries=tries, backoff=0.001, **known)
        return (tmp_path / "a.zip").read_bytes()

    return get


def starts(server):
    return [start for _, _, start in server.seen]


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_download__whole(server, get, tmp_path):
    assert get(size=len(BODY), sha256=SHA256) == BODY
    assert left(tmp_path) == ["a.zip"]


@pytest.mark.parametrize(
    "page",
    [
        Page(BODY),
        Page(BODY, etag=None, modified="Wed, 21 Oct 2015 07:28:00 GMT"),
        Page(BODY, etag='W/"weak"', modified="Wed, 21 Oct 2015 07:28:00 GMT"),
    ],
    ids=["etag", "date", "weak etag"],
)
def test_download__cut_three_times_is_resumed(server, get, tmp_path, page):
    server.pages["a.zip"] = page
    server.faults["a.zip"] = [Fault(cut=10_000), Fault(cut=20_000), Fault(cut=10)]
    assert get() == BODY
    assert starts(server) == [0, 10_000, 30_000, 30_010]
    assert left(tmp_path) == ["a.zip"]


@pytest.mark.parametrize(
    "known", [{"sha256": SHA256}, {"size": len(BODY)}, {}], ids=["sha256", "size", "neither"]
)
def test_download__later_call_resumes_from_another_address_if_the_file_is_known(server, get, known):
    """Without a digest or length another server's file could be a different one."""
    server.faults["a.zip"] = [Fault(cut=40_000)]
    with pytest.raises(DownloadError):
        get(tries=1, **known)
    server.pages["mirror/a.zip"] = Page(BODY, etag='"another"')
    assert get("mirror/a.zip", **known) == BODY
    assert starts(server)[-1] == 40_000
    assert len(server.seen) == 2


def test_download__wrong_bytes_of_another_address_are_replaced(server, get):
    server.pages["other/a.zip"] = Page(OTHER)
    server.faults["other/a.zip"] = [Fault(cut=40_000)] + [Fault(status=500)] * 3
    assert get("other/a.zip", "a.zip", sha256=SHA256) == BODY
    assert [start for _, path, start in server.seen if path == "a.zip"] == [40_000, 0]


@pytest.mark.parametrize("page", [Page(b"log in", kind="text/html"), Page(OTHER)])
def test_download__address_without_the_file_does_not_cost_the_partial_one(server, get, tmp_path, page):
    (tmp_path / "a.zip.part").write_bytes(BODY[:40_000])
    server.pages["bad.zip"] = page
    server.faults["bad.zip"] = [Fault(ignore_range=True)]
    assert get("bad.zip", "a.zip", sha256=SHA256, size=len(BODY)) == BODY
    assert starts(server) == [40_000, 40_000]


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"size": len(BODY)}])
def test_download__killed_before_the_rename(server, get, tmp_path, known):
    (tmp_path / "a.zip.part").write_bytes(BODY)
    assert get(**known) == BODY
    assert len(server.seen) == ("sha256" in known)  # one request for the length


@pytest.mark.parametrize(
    ("fault", "known", "why"),
    [
        (Fault(length=""), {}, "does not say how long"),
        (Fault(), {"size": 7}, r"has 102,402 bytes, must have 7"),
        (Fault(), {"sha256": "00"}, r"its SHA-256 is [0-9a-f]{64}, must be 00"),
        (Fault(length=str(10**15)), {}, "are free on the disk"),
        (Fault(length="seven"), {}, "invalid literal"),
        (Fault(status=404), {}, "HTTP 404 Not Found"),
        (Fault(status=403), {}, "HTTP 403 Forbidden"),
        (Fault(swap=Page(b"please log in", kind="text/html; charset=utf-8")), {}, "sends a web page"),
    ],
)
def test_download__address_that_lacks_the_file_is_not_tried_again(server, get, tmp_path, fault, known, why):
    server.pages["bad.zip"] = Page(BODY)
    server.faults["bad.zip"] = [fault]
    with pytest.raises(DownloadError, match=f"bad.zip: .*{why}"):
        get("bad.zip", **known)
    assert len(server.seen) == 1
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("fault", [Fault(status=404), Fault(length=str(10**15)), Fault(drip=True)])
def test_download__next_address(server, get, fault):
    server.pages["bad.zip"] = Page(BODY)
    server.faults["bad.zip"] = [fault] * 4
    assert get("bad.zip", "a.zip", timeout=0.2) == BODY


def test_download__all_addresses_fail(server, tmp_path):
    server.faults["a.zip"] = [Fault(status=500)] * 9
    urls = [f"{server.address}/a.zip", "http://127.0.0.1:9/a", "no address"]
    with pytest.raises(DownloadError) as error:
        download(urls, tmp_path / "a.zip", tries=2, backoff=0.001)
    whys = ("HTTP 500 Internal Server Error; gave up after 2 tries", "connection failed", "")
    for url, why, line in zip(urls, whys, error.value.mistakes, strict=True):
        assert line.startswith(f"{url}: {why}")


CHANGED = [Page(OTHER, etag='"two"'), Page(BODY[:500], etag='"two"')]


@pytest.mark.parametrize("fault", [Fault(ignore_range=True), *(Fault(swap=page) for page in CHANGED)])
def test_download__server_that_cannot_resume_or_file_that_changed(server, get, fault):
    server.faults["a.zip"] = [Fault(cut=10_000), fault]
    assert get() == server.pages["a.zip"].body


def test_download__waits_longer_each_time_or_as_asked(server, get, monkeypatch, tmp_path):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    busy = Fault(status=429, headers=(("Retry-After", "7"),))
    endless = Fault(status=503, headers=(("Retry-After", "86400"),))
    server.faults["a.zip"] = [Fault(status=503), Fault(status=500), busy, endless]
    download([f"{server.address}/a.zip"], tmp_path / "a.zip", tries=9)
    assert waits == [1.0, 2.0, 7.0, 120.0]


def test_download__hanging_server_times_out(server, get):
    server.faults["a.zip"] = [Fault(cut=10_000, hang=True), Fault(cut=0, hang=True)]
    assert get(timeout=0.2) == BODY
    assert starts(server) == [0, 10_000, 10_000]


def test_download__killed_then_resumed(server, get, tmp_path):
    server.faults["a.zip"] = [Fault(cut=90_000, hang=True)]
    program = (
        "from pathlib import Path; from utils.download import download; "
        f"download(['{server.address}/a.zip'], Path('{tmp_path / 'a.zip'}'))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    part = tmp_path / "a.zip.part"
    while not (part.is_file() and part.stat().st_size >= 80_000):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    size = part.stat().st_size
    assert get() == BODY
    assert starts(server) == [0, size]


def test_exclusive__second_says_who_holds_it_and_waits(tmp_path, capfd):
    order = []

    def second():
        with exclusive(tmp_path / "data"):
            order.append("second")

    with exclusive(tmp_path / "data"):
        thread = threading.Thread(target=second)
        thread.start()
        while "waiting" not in capfd.readouterr().out:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


FILES = {"set/imgs/a.jpg": b"a" * 5000, "set/imgs/b.jpg": bytes(range(256)), "set/list.txt": b"a\nb\n"}
WANTED = ("imgs", "list.txt")


def pack(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("prefix", ["", "set/"])
def test_extract__wanted_part_at_the_top_or_one_down(tmp_path, prefix):
    files = {f"{prefix}{name.removeprefix('set/')}": content for name, content in FILES.items()}
    more = {"__MACOSX/x/imgs/._a.jpg": b"", f"{prefix}README": b"not wanted", f"{prefix}deep/er/imgs/c": b""}
    archive = pack(tmp_path / "a.zip", files | more)
    extract(archive, tmp_path / "out", WANTED)
    assert tree(tmp_path / "out") == {name.removeprefix("set/"): content for name, content in FILES.items()}
    assert left(tmp_path / "out") == ["imgs", "list.txt"]


def test_extract__existing_results_stay_and_an_interrupted_call_is_continued(tmp_path):
    archive, out = pack(tmp_path / "a.zip", FILES), tmp_path / "out"
    staging = out / ".a.zip.unpacking/set/imgs"
    staging.mkdir(parents=True)
    (staging / "a.jpg").write_bytes(b"b" * 5000)  # complete: not written again
    (staging / "b.jpg").write_bytes(b"cut")
    (out / "list.txt").write_text("mine")
    extract(archive, out, WANTED)
    assert (out / "list.txt").read_text() == "mine"
    assert (out / "imgs/a.jpg").read_bytes() == b"b" * 5000
    assert (out / "imgs/b.jpg").read_bytes() == FILES["set/imgs/b.jpg"]


def test_extract__nothing_leaves_the_folder_and_no_link_is_made(tmp_path):
    names = ("../imgs/x", "imgs/../../../x", "/imgs/x", "/etc/imgs/x", "..\\imgs\\x")
    link = zipfile.ZipInfo("imgs/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    files = {"imgs/good": b"x", link: b"/etc/passwd"} | dict.fromkeys(names, b"evil")
    extract(pack(tmp_path / "a.zip", files), tmp_path / "in/out", ("imgs",))
    assert left(tmp_path) == ["a.zip", "in"]
    assert left(tmp_path / "in") == ["out"]
    assert (tmp_path / "in/out/imgs/good").read_bytes() == b"x"
    assert not (tmp_path / "in/out/imgs/link").is_symlink()


def damaged(path):
    path.write_bytes(path.read_bytes().replace(b"aaaa", b"abba", 1))


@pytest.mark.parametrize(
    "damage",
    [
        damaged,
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(b"PK nonsense"),
        lambda path: path.write_bytes(b""),
    ],
)
def test_extract__damaged_archive(tmp_path, damage):
    archive = pack(tmp_path / "a.zip", FILES)
    damage(archive)
    with pytest.raises(UserError, match=r"a\.zip: damaged, or not a zip archive.*delete it"):
        extract(archive, tmp_path / "out", WANTED)
    assert not (tmp_path / "out").exists() or left(tmp_path / "out") == []


def test_extract__lacks_something_or_the_disk_is_too_small(tmp_path, monkeypatch):
    archive = pack(tmp_path / "a.zip", FILES)
    with pytest.raises(UserError, match="does not contain other"):
        extract(archive, tmp_path / "out", ("imgs", "other"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 4000))
    with pytest.raises(UserError, match=r"a\.zip: unpacks to 5\.26kB, 4\.00kB are free"):
        extract(archive, tmp_path / "small", WANTED)
