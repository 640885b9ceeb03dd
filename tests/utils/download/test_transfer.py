"""Fetching, from a server that cuts, lies, hangs, changes its mind and asks for patience."""

import hashlib
import json
import shutil
from collections import namedtuple
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from tests.utils.download.server import Fault, Page, serving
from utils.download.transfer import FetchError, Patience, Wanted, fetch, size_of
from utils.errors import UserError

BODY = b"PK" + bytes(range(256)) * 40
OTHER = b"PK" + bytes(reversed(range(256))) * 50


@pytest.fixture
def server():
    with serving() as server:
        server.pages["a.zip"] = Page(BODY)
        yield server


@pytest.fixture
def get(server, tmp_path):
    """Fetches a.zip; `get.waits` has what it would have slept."""
    waits = []

    def get(*names, timeout=5.0, tries=4, worthwhile=1 << 20, **known):
        patience = Patience(tries, timeout, 1.0, 60.0, worthwhile, waits.append)
        addresses = [f"{server.address}/{name}" for name in names or ("a.zip",)]
        return fetch(addresses, tmp_path / "a.zip", wanted=Wanted(b"PK", **known), patience=patience)

    get.waits = waits
    return get


def starts(server):
    return [start for _, _, start in server.seen]


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fetch__whole(server, get, tmp_path):
    fetched = get(size=len(BODY), sha256=hashlib.sha256(BODY).hexdigest())
    assert (tmp_path / "a.zip").read_bytes() == BODY
    assert fetched.address == f"{server.address}/a.zip"
    assert (fetched.size, fetched.etag) == (len(BODY), '"one"')
    assert fetched.sha256 == hashlib.sha256(BODY).hexdigest()
    assert left(tmp_path) == ["a.zip"]
    assert get.waits == []


@pytest.mark.parametrize(
    "page",
    [
        Page(BODY),
        Page(BODY, etag=None, modified="Wed, 21 Oct 2015 07:28:00 GMT"),
        Page(BODY, etag='W/"weak"', modified="Wed, 21 Oct 2015 07:28:00 GMT"),
        Page(BODY, etag=None),
    ],
    ids=["etag", "date", "weak etag", "neither"],
)
def test_fetch__cut_three_times_is_resumed(server, get, tmp_path, page):
    server.pages["a.zip"] = page
    server.faults["a.zip"] = [Fault(cut=1000), Fault(cut=2000), Fault(cut=10)]
    fetched = get()
    assert (tmp_path / "a.zip").read_bytes() == BODY
    assert starts(server) == [0, 1000, 3000, 3010]
    assert get.waits == [1.0, 2.0, 4.0]
    assert fetched.sha256 == hashlib.sha256(BODY).hexdigest()


def test_fetch__worthwhile_tries_do_not_count(server, get, tmp_path):
    server.faults["a.zip"] = [Fault(cut=1000) for _ in range(8)]
    get(tries=2, worthwhile=500)
    assert (tmp_path / "a.zip").read_bytes() == BODY
    assert get.waits == [1.0] * 8


def test_fetch__server_that_ignores_range_restarts(server, get, tmp_path):
    server.faults["a.zip"] = [Fault(cut=1000), Fault(ignore_range=True)]
    get()
    assert (tmp_path / "a.zip").read_bytes() == BODY


@pytest.mark.parametrize("condition", [False, True])
def test_fetch__file_that_changed_restarts(server, get, tmp_path, condition):
    changed = Fault(swap=Page(OTHER, etag='"two"'), ignore_condition=condition)
    server.faults["a.zip"] = [Fault(cut=1000), changed]
    assert get().etag == '"two"'
    assert (tmp_path / "a.zip").read_bytes() == OTHER


def test_fetch__file_that_became_shorter_restarts(server, get, tmp_path):
    short = Page(BODY[:500], etag=None)
    server.pages["a.zip"] = Page(BODY, etag=None)
    server.faults["a.zip"] = [Fault(cut=1000), Fault(swap=short)]
    get()
    assert (tmp_path / "a.zip").read_bytes() == BODY[:500]


def test_fetch__goes_on_after_a_stopped_run(server, get, tmp_path):
    server.faults["a.zip"] = [Fault(cut=4000)] + [Fault(status=503)] * 9
    with pytest.raises(FetchError):
        get()
    assert left(tmp_path) == ["a.zip.part", "a.zip.part.json"]
    server.faults.clear()
    get()
    assert starts(server)[-1] == 4000
    assert (tmp_path / "a.zip").read_bytes() == BODY


def test_fetch__stopped_before_the_rename(server, get, tmp_path):
    about = {
        "address": f"{server.address}/a.zip",
        "size": len(BODY),
        "etag": '"one"',
        "last_modified": None,
    }
    (tmp_path / "a.zip.part.json").write_text(json.dumps(about))
    (tmp_path / "a.zip.part").write_bytes(BODY)
    assert get().sha256 == hashlib.sha256(BODY).hexdigest()
    assert server.seen == []


@pytest.mark.parametrize("about", [None, "no JSON", '{"size": 3}'])
def test_fetch__part_of_unknown_origin_is_dropped(server, get, tmp_path, about):
    (tmp_path / "a.zip.part").write_bytes(b"something else")
    if about is not None:
        (tmp_path / "a.zip.part.json").write_text(about)
    get()
    assert (tmp_path / "a.zip").read_bytes() == BODY
    assert starts(server) == [0]


def test_fetch__short_body_is_no_success(server, get, tmp_path):
    server.faults["a.zip"] = [Fault(cut=100, ignore_range=True) for _ in range(9)]
    with pytest.raises(FetchError, match=r"cut after 100 of 10,242 bytes; given up after 4 tries"):
        get()
    assert not (tmp_path / "a.zip").exists()


def test_fetch__content_length_beyond_the_body(server, get, tmp_path):
    server.faults["a.zip"] = [Fault(length=str(len(BODY) + 7), ignore_range=True) for _ in range(9)]
    with pytest.raises(FetchError, match=r"cut after 10,242 of 10,249 bytes"):
        get()
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("fault", [Fault(length="17"), Fault(range="bytes 5-9/10242"), Fault(range="x")])
def test_fetch__headers_that_disagree_are_not_believed(server, get, tmp_path, fault):
    server.faults["a.zip"] = [Fault(cut=1000), fault]
    get()
    assert (tmp_path / "a.zip").read_bytes() == BODY


def test_fetch__no_length(server, get):
    server.faults["a.zip"] = [Fault(length="")]
    with pytest.raises(FetchError, match="does not say how long"):
        get()


def test_fetch__wrong_size_digest_or_beginning(server, get, tmp_path):
    with pytest.raises(FetchError, match=r"has 10,242 bytes, must have 7"):
        get(size=7)
    with pytest.raises(FetchError, match=r"its SHA-256 is [0-9a-f]{64}, must be 00"):
        get(sha256="00")
    server.pages["a.zip"] = Page(b"<html>please log in</html>")
    with pytest.raises(FetchError, match=r"begins with b'<html>please log', must with b'PK'"):
        get()
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("status", [404, 403, 410])
def test_fetch__next_address(server, get, tmp_path, capsys, status):
    server.faults["gone.zip"] = [Fault(status=status)]
    assert get("gone.zip", "a.zip").address.endswith("/a.zip")
    assert f"gone.zip: answers {status}" in capsys.readouterr().out
    assert get.waits == []


def test_fetch__all_addresses_fail(server, get):
    server.faults["a.zip"] = [Fault(status=500)] * 9
    with pytest.raises(FetchError) as error:
        get("gone.zip", "a.zip")
    assert [line.split("/")[-1] for line in error.value.mistakes] == [
        "gone.zip: answers 404 Not Found",
        "a.zip: answers 500 Internal Server Error; given up after 4 tries",
    ]
    assert get.waits == [1.0, 2.0, 4.0]


def test_fetch__busy_then_there(server, get):
    server.faults["a.zip"] = [Fault(status=503), Fault(status=429, headers=(("Retry-After", "7"),))]
    get()
    assert get.waits == [1.0, 7.0]


def test_fetch__retry_after_a_date(server, get):
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    server.faults["a.zip"] = [Fault(status=503, headers=(("Retry-After", date),))]
    get()
    assert 20 < get.waits[0] <= 30


def test_fetch__retry_after_too_long_is_not_waited_for(server, get):
    server.faults["a.zip"] = [Fault(status=429, headers=(("Retry-After", "86400"),))]
    with pytest.raises(FetchError, match="asks to wait 86400 s"):
        get()
    assert get.waits == []


def test_fetch__hanging_server_times_out(server, get, tmp_path):
    server.faults["a.zip"] = [Fault(cut=1000, hang=True), Fault(cut=0, hang=True)]
    get(timeout=0.2)
    assert (tmp_path / "a.zip").read_bytes() == BODY
    assert starts(server) == [0, 1000, 1000]


def test_fetch__nobody_listens(tmp_path):
    with serving() as server:
        address = server.address
    waits = []
    with pytest.raises(FetchError, match="Connection refused"):
        fetch(
            [address],
            tmp_path / "a",
            wanted=Wanted(),
            patience=Patience(tries=2, sleep=waits.append),
        )
    assert waits == [1.0]


def test_fetch__no_space(server, get, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 3000))
    with pytest.raises(UserError, match=r"the rest of a\.zip needs 10\.2 kB, 3\.0 kB are free"):
        get()


def test_patience__waits_are_bounded():
    waits = [Patience(longest_wait=10).wait(failures) for failures in (1, 2, 4, 5, 9)]
    assert waits == [1, 2, 8, 10, 10]


def test_size_of__asks_for_no_body(server):
    assert size_of(f"{server.address}/a.zip", timeout=5) == len(BODY)
    assert size_of(f"{server.address}/gone.zip", timeout=5) is None
    assert size_of("nonsense", timeout=5) is None
    assert server.bodies() == []
