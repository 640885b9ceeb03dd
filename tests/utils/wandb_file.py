"""Reads a .wandb file: wandb's protobuf records in LevelDB's log format."""

import json
import time
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK, CHUNK = 7, 2**15, 7  # bytes of the file's header, of a block, of a chunk's header
FULL, LAST = 1, 4  # kinds of chunks that end a record


def read_records(path: Path) -> list[Record]:
    data = path.read_bytes()
    records, place, content = [], HEADER, b""
    while place + CHUNK <= len(data):
        if BLOCK - place % BLOCK < CHUNK:  # padding
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if kind == 0:
            break
        content += data[place + CHUNK : place + CHUNK + length]
        place += CHUNK + length
        if kind in (FULL, LAST):
            records.append(Record.FromString(content))
            content = b""
    return records


def _items(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class WandbFile:
    """History rows, summary, config, files and artifacts of the one run in a folder."""

    def __init__(self, folder: Path) -> None:
        (self.path,) = folder.rglob("run-*.wandb")
        for _ in range(1000):  # wandb's own process may still be writing
            records = read_records(self.path)
            if records and records[-1].WhichOneof("record_type") == "exit":
                break
            time.sleep(0.1)
        self.history = [_items(r.history.item) for r in records if r.HasField("history")]
        self.summary: dict = {}
        self.config: dict = {}
        self.files, self.artifacts = set(), []
        for record in records:
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
