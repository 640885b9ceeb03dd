"""An HTTP server on 127.0.0.1 that misbehaves on demand."""

import contextlib
import re
import threading
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from utils.download.sources import TARGETS


@dataclass(frozen=True)
class Page:
    """A file that is served, and the headers that tell its version."""

    body: bytes
    etag: str | None = '"one"'
    modified: str | None = None


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one GET.

    `status` answers with it and `headers`; `cut` ends the body after so many bytes; `hang` sends `cut` bytes
    and then nothing; `ignore_range` sends all of it, `ignore_condition` resumes whatever If-Range says;
    `length` and `range` replace headers ('' leaves them out); `swap` is served from now on.
    """

    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    cut: int | None = None
    hang: bool = False
    ignore_range: bool = False
    ignore_condition: bool = False
    length: str | None = None
    range: str | None = None
    swap: Page | None = None


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path, server = self.path.lstrip("/"), self.server
        faults = server.faults.get(path, [])
        fault = faults.pop(0) if faults and body else Fault()
        if fault.swap is not None:
            server.pages[path] = fault.swap
        page = server.pages.get(path)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        server.seen.append((self.command, path, start))
        status = fault.status or (404 if page is None else None)
        if status is not None:
            self.send_response(status)
            for name, value in fault.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not self.may_resume(page, fault):
            start = 0
        if start and start >= len(page.body):
            self.send_error(416)
            return
        self.send_page(page, fault, start, body=body)

    def may_resume(self, page, fault):
        condition = self.headers.get("If-Range")
        if fault.ignore_condition:
            return True
        return not fault.ignore_range and condition in (None, page.etag, page.modified)

    def send_page(self, page, fault, start, *, body):
        rest = page.body[start:]
        self.send_response(206 if start else 200)
        given = f"bytes {start}-{len(page.body) - 1}/{len(page.body)}" if fault.range is None else fault.range
        length = str(len(rest)) if fault.length is None else fault.length
        for name, value in (
            ("Content-Length", length),
            ("Content-Range", given if start else ""),
            ("ETag", page.etag),
            ("Last-Modified", page.modified),
        ):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if body:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(rest[: fault.cut])
            if fault.hang:
                self.server.closing.wait(5)


class Server(ThreadingHTTPServer):
    """Serves `pages`; each GET of a path takes the next of its `faults`; `seen` has (method, path, start)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.faults, self.seen = {}, {}, []
        self.closing = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self):
        """Paths of which a body was asked for."""
        return [path for method, path, _ in self.seen if method == "GET"]


@contextlib.contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def targets_at(server):
    """The real table, its addresses those of a server, without digests that miniatures cannot have."""

    def moved(file):
        if not file.addresses:
            return file
        return replace(file, addresses=(f"{server.address}/{file.name}",), sha256=None)

    return {
        name: replace(target, plans=tuple(tuple(map(moved, plan)) for plan in target.plans))
        for name, target in TARGETS.items()
    }
