"""A stand-in for wandb's server on 127.0.0.1: it stores runs and their history, and takes any file."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import wandb

from utils.training import loggers

PROJECT = {"name": "PPAP", "entity": {"name": "me"}}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_PUT(self):
        self.answer(lambda body: {})

    def do_POST(self):
        if self.path == "/graphql":
            self.answer(lambda body: {"data": self.data(json.loads(body))})
        else:
            self.answer(self.stream if self.path.endswith("file_stream") else lambda body: {})

    def answer(self, make):
        content = json.dumps(make(self.rfile.read(int(self.headers["Content-Length"])))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def data(self, asked):
        variables, server = asked.get("variables"), self.server
        operation = asked["operationName"]
        server.asked.add(operation)
        if operation == "UpsertBucket":
            server.given.append(variables)
            new = server.runs.setdefault(variables["name"], {}) == {}
            return {"upsertBucket": {"bucket": self.bucket(variables["name"]), "inserted": new}}
        if operation == "RunResumeStatus" and variables["name"] in server.runs:
            return {"model": PROJECT | {"bucket": self.bucket(variables["name"])}}
        if operation == "CreateRunFiles":
            server.files.update(variables["files"])
            files = [{"name": name, "uploadUrl": f"{server.address}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def bucket(self, name):
        history = self.server.runs[name]
        return {
            "id": name, "name": name, "project": PROJECT, "config": "{}", "summaryMetrics": "{}", "tags": [],
            "historyLineCount": len(history), "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]",
            "historyTail": json.dumps([history[max(history)]] if history else []),
            "wandbConfig": '{"t": 1}',  # the run has started
        }  # fmt: skip

    def stream(self, body):
        files = json.loads(body).get("files", {})
        new = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        lines = dict(enumerate(new["content"], start=new["offset"]))
        self.server.runs.setdefault(self.path.split("/")[-2], {}).update(lines)
        for summary in files.get("wandb-summary.json", {"content": []})["content"]:
            self.server.summary.update(json.loads(summary))
        return {}


class WandbServer(ThreadingHTTPServer):
    """`runs`: id -> row -> line of the history; `given`: their settings; `asked`: operations.

    `files` and `summary` are those of all runs.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs, self.given, self.asked, self.files, self.summary = {}, [], set(), set(), {}
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def history(self, run):
        return [json.loads(line) for _, line in sorted(self.runs[run].items())]


@pytest.fixture
def wandb_server(monkeypatch):
    wandb.teardown()  # which has read the address
    # of wandb 0.28, which keeps the connection of an earlier test
    monkeypatch.setattr(wandb.api, "_api", None, raising=False)
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setattr(loggers, "INIT_SECONDS", 120)
        yield server
        wandb.teardown()
