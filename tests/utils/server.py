"""An HTTP server on 127.0.0.1 that fails on demand."""

import contextlib
import io
import re
import threading
import zipfile
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dataset.dataset_download import TARGETS


@dataclass(frozen=True)
class Page:
    """A file on the server."""

    body: bytes
    kind: str = "application/octet-stream"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one GET.

    `status` is answered with `headers`; `cut` ends the body after so many bytes; `hang` sends `cut` bytes and
    then nothing; `ignore_range` sends the whole file; `swap` is served from now on; `length` is announced;
    `drip` sends a byte at a time.
    """

    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    cut: int | None = None
    hang: bool = False
    ignore_range: bool = False
    swap: Page | None = None
    length: int | None = None
    drip: bool = False


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):
        path, server = self.path.lstrip("/"), self.server
        faults = server.faults.get(path, [])
        fault = faults.pop(0) if faults else Fault()
        if fault.swap is not None:
            server.pages[path] = fault.swap
        page = server.pages.get(path)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        server.seen.append((path, start))
        status = fault.status or (404 if page is None else None)
        if status is not None:
            self.empty(status, fault.headers)
        elif fault.ignore_range:
            self.send_page(page, fault, 0)
        elif start and start >= len(page.body):
            self.empty(416, ())
        else:
            self.send_page(page, fault, start)

    def empty(self, status, headers):
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", "0")):
            self.send_header(name, value)
        self.end_headers()

    def send_page(self, page, fault, start):
        rest = page.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(fault.length or len(rest)))
        self.send_header("Content-Type", page.kind)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while fault.drip and not self.server.closing.wait(0.05):
                self.wfile.write(rest[:1])
            self.wfile.write(rest[: fault.cut])
        if fault.hang:
            self.server.closing.wait(5)


class Server(ThreadingHTTPServer):
    """Serves `pages`; each GET of a path takes the next of its `faults`; `seen` has (path, start)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.faults, self.seen = {}, {}, []
        self.closing = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self):
        """Paths that were requested."""
        return [path for path, _ in self.seen]


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
    """The real table with the server's addresses, without the digests of the real files."""

    def moved(file):
        return replace(file, bases=(server.address,) if file.bases else (), sha256=None)

    return {
        name: replace(target, plans=tuple(tuple(map(moved, plan)) for plan in target.plans))
        for name, target in TARGETS.items()
    }


def zipped(folder, *, below=""):
    """A zip archive of a folder's files, their names prefixed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, f"{below}{file.relative_to(folder)}")
    return Page(buffer.getvalue())


def coco_pages(coco):
    """The lists and archives of the official addresses, of a COCO-Stuff in its layout."""
    pages = {str(path.relative_to(coco)): Page(path.read_bytes()) for path in coco.glob("curated/*/*")}
    pages["stuffthingmaps_trainval2017.zip"] = zipped(coco / "annotations")
    for split in ("train2017", "val2017"):
        pages[f"{split}.zip"] = zipped(coco / "images" / split, below=f"{split}/")
    return pages
