"""Downloads from a server that cuts, hangs and lacks files; and archives, whole and damaged."""

import hashlib
import re
import stat
import zipfile

import pytest

from tests.utils.server import Fault, Page, serving
from utils import download as module
from utils.download import DownloadError, download, extract
from utils.errors import UserError

BODY = b"PK" + bytes(range(256)) * 2000
OTHER = b"PK" + bytes(reversed(range(256))) * 2500
SHA256 = hashlib.sha256(BODY).hexdigest()
CUT = 3 * module.CHUNK


@pytest.fixture
def server():
    with serving() as server:
        server.pages["a.zip"] = Page(BODY)
        yield server


@pytest.fixture
def get(server, tmp_path, monkeypatch):
    """Downloads a.zip, quickly."""
    monkeypatch.setattr(module, "BACKOFF", 0.001)
    monkeypatch.setattr(module, "TRIES", 3)

    def get(*names, timeout=5.0, **known):
        monkeypatch.setattr(module, "TIMEOUT", timeout)
        urls = [name if ":" in name else f"{server.address}/{name}" for name in names or ("a.zip",)]
        download(urls, tmp_path / "a.zip", **known)
        return (tmp_path / "a.zip").read_bytes()

    return get


def starts(server):
    return [start for _, start in server.seen]


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_download__cut_is_resumed(server, get, tmp_path):
    server.faults["a.zip"] = [Fault(cut=CUT), Fault(cut=module.CHUNK), Fault(cut=10)]
    assert get() == BODY
    assert starts(server) == [0, CUT, CUT + module.CHUNK, CUT + module.CHUNK + 10]
    assert left(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {}])
def test_download__later_call_resumes_from_another_address_if_the_file_is_known(server, get, known):
    server.faults["a.zip"] = [Fault(cut=CUT), *[Fault(status=500)] * 3]
    with pytest.raises(DownloadError):
        get(**known)
    server.pages["mirror/a.zip"] = Page(BODY)
    assert get("mirror/a.zip", **known) == BODY
    assert starts(server)[-1] == (CUT if known else 0)


@pytest.mark.parametrize("page", [Page(b"log in", kind="text/html"), Page(OTHER)])
def test_download__address_without_the_file_does_not_cost_the_partial_one(server, get, tmp_path, page):
    (tmp_path / "a.zip.part").write_bytes(BODY[:CUT])
    server.pages["bad.zip"] = page
    server.faults["bad.zip"] = [Fault(ignore_range=True)]
    assert get("bad.zip", "a.zip", sha256=SHA256, size=len(BODY)) == BODY
    assert starts(server) == [CUT, CUT]


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"size": len(BODY)}])
def test_download__killed_before_the_rename(get, tmp_path, known):
    (tmp_path / "a.zip.part").write_bytes(BODY)
    assert get(**known) == BODY


@pytest.mark.parametrize(
    ("fault", "known", "why"),
    [
        (Fault(), {"size": 7}, "has 512,002 bytes, must have 7"),
        (Fault(), {"sha256": "00"}, "its SHA-256 is [0-9a-f]{64}, must be 00"),
        (Fault(status=404), {}, "HTTP 404 Not Found"),
        (Fault(swap=Page(b"please log in", kind="text/html; charset=utf-8")), {}, "sent a web page"),
    ],
)
def test_download__address_that_lacks_the_file_is_not_tried_again(server, get, tmp_path, fault, known, why):
    server.pages["bad.zip"] = Page(BODY)
    server.faults["bad.zip"] = [fault]
    with pytest.raises(DownloadError, match=f"bad.zip: .*{why}"):
        get("bad.zip", **known)
    assert len(server.seen) == 1
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize(
    ("fault", "why"),
    [(Fault(length=10**15), "are free"), (Fault(drip=True), "less than .* bytes per second")],
)
def test_download__address_that_lies_or_drips(server, get, fault, why):
    server.pages["bad.zip"] = Page(BODY)
    server.faults["bad.zip"] = [fault] * 2
    with pytest.raises(DownloadError, match=f"bad.zip: .*{why}"):
        get("bad.zip", timeout=0.2)
    assert get("bad.zip", "a.zip", timeout=0.2) == BODY


def test_download__next_address(server, get):
    assert get("missing.zip", "http://127.0.0.1:9/a", "a.zip") == BODY


def test_download__all_addresses_fail(server, get):
    server.faults["a.zip"] = [Fault(status=500)] * 9
    with pytest.raises(DownloadError) as error:
        get("a.zip", "http://127.0.0.1:9/a", "scheme:no address")
    whys = (f"{server.address}/a.zip: HTTP 500 Internal", ".*refused", ".*No connection adapters")
    for why, line in zip(whys, error.value.mistakes, strict=True):
        assert re.match(why, line)


@pytest.mark.parametrize("fault", [Fault(ignore_range=True), Fault(swap=Page(BODY[:500]))])
def test_download__server_that_cannot_resume_or_file_that_shrank(server, get, fault):
    server.faults["a.zip"] = [Fault(cut=CUT), fault]
    assert get() == server.pages["a.zip"].body


def test_download__busy_or_hanging_server(server, get):
    busy = Fault(status=429, headers=(("Retry-After", "0"),))
    server.faults["a.zip"] = [Fault(status=503), busy, Fault(cut=CUT, hang=True), Fault(cut=0, hang=True)]
    assert get(timeout=0.5) == BODY


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
    more = {"__MACOSX/imgs/._a.jpg": b"", f"{prefix}README": b"not wanted", f"{prefix}deep/er/imgs/c": b""}
    archive = pack(tmp_path / "a.zip", files | more)
    extract(archive, tmp_path / "out", WANTED)
    assert tree(tmp_path / "out") == {name.removeprefix("set/"): content for name, content in FILES.items()}


def test_extract__interrupted_call_is_continued(tmp_path):
    archive, out = pack(tmp_path / "a.zip", FILES), tmp_path / "out"
    (out / "imgs").mkdir(parents=True)
    (out / "imgs/a.jpg").write_bytes(b"b" * 5000)  # complete: not written again
    (out / "imgs/b.jpg").write_bytes(b"cut")
    extract(archive, out, WANTED)
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


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.replace(b"aaaa", b"abba", 1),
        lambda content: content[:-30],
        lambda content: b"",
    ],
)
def test_extract__damaged_archive(tmp_path, damage):
    archive = pack(tmp_path / "a.zip", FILES)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(UserError, match=r"a\.zip: damaged, or not a zip archive.*delete it"):
        extract(archive, tmp_path / "out", WANTED)
    assert not (tmp_path / "out/imgs/a.jpg").exists()


def test_extract__archive_lacks_something(tmp_path):
    with pytest.raises(UserError, match="does not contain other"):
        extract(pack(tmp_path / "a.zip", FILES), tmp_path / "out", ("imgs", "other"))
