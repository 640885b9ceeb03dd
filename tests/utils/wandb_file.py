"""What a .wandb file holds: wandb's own messages, in the LevelDB log that it writes them to.

wandb's Python reader of that log went with its move to Go, so the framing is read here.
"""

import json
import time
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK, CHUNK = 7, 2**15, 7  # bytes of the file's header, of a block, of a chunk's header


def messages(path: Path) -> list[Record]:
    """All records, in order."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    found, place, whole = [], HEADER, b""
    while place + CHUNK <= len(data):
        if BLOCK - place % BLOCK < CHUNK:  # padding
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if kind == 0:
            break
        whole += data[place + CHUNK : place + CHUNK + length]
        place += CHUNK + length
        if kind in (1, 4):  # the last chunk of a record, or its only one
            record = Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def _items(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class WandbFile:
    """History rows, the last summary, config, tags, files and artifacts of a run."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.rglob("run-*.wandb")
        self.path, self.records = path, messages(path)
        for _ in range(100):  # wandb's own process may still be writing what was sent to it
            if self.records and self.records[-1].WhichOneof("record_type") == "exit":
                break
            time.sleep(0.1)
            self.records = messages(path)
        self.history = [_items(r.history.item) for r in self.records if r.HasField("history")]
        self.summary: dict = {}
        self.config: dict = {}
        self.files, self.artifacts = set(), []
        for record in self.records:
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self.config |= _items(record.run.config.update)
            elif kind == "summary":
                self.summary |= _items(record.summary.update)
            elif kind == "config":
                self.config |= _items(record.config.update)
            elif kind == "files":
                self.files |= {file.path for file in record.files.files}
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "request" and record.request.HasField("log_artifact"):
                self.artifacts.append(record.request.log_artifact.artifact)
