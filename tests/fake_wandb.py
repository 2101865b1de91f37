"""A stand-in for the parts of wandb's server that `wandb sync` uses."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """Records uploads: `rows[run]`, the history by line, `configs[run]`, and the names of files."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.configs: dict[str, str] = {}
        self.about: dict[str, Any] = {}  # the first request about a run
        self.files: list[str] = []
        self.url = ""

    def answer(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer one GraphQL operation."""
        if name == "UpsertBucket":
            return {"upsertBucket": {"bucket": self.upsert(asked["name"], asked), "inserted": True}}
        if name == "RunResumeStatus" and asked["name"] in self.rows:
            return {"model": {"id": "P", "name": "p", "entity": entity(), "bucket": self.bucket(asked["name"])}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/up/{file}"} for file in asked["files"]]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        if name == "CreateArtifact":  # as if it had been uploaded before
            sequence = {"id": "S", "latestArtifact": None}
            return {"createArtifact": {"artifact": {"id": "A", "state": "COMMITTED", "artifactSequence": sequence}}}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if name == "Viewer":
            return {"viewer": {"id": "V", "entity": "team", "flags": "{}", "teams": {"edges": []}}}
        return {"model": None}

    def upsert(self, run: str, asked: dict[str, Any]) -> dict[str, Any]:
        self.rows.setdefault(run, {})
        self.about.setdefault(run, asked)
        self.configs[run] = asked.get("config") or self.configs.get(run, "{}")
        return self.bucket(run)

    def bucket(self, run: str) -> dict[str, Any]:
        rows = self.rows[run]
        return {
            "id": f"ID-{run}",
            "name": run,
            "displayName": run,
            "description": "",
            "config": self.configs[run],
            "sweepName": None,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(rows[max(rows)])] if rows else []),
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "wandbConfig": '{"t": 1}',
            "tags": [],
            "project": {"id": "P", "name": "p", "entity": entity()},
        }

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Add lines to a run's history."""
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for i, line in enumerate(history["content"]):
            self.rows[run][history["offset"] + i] = json.loads(line)


def entity() -> dict[str, str]:
    return {"id": "E", "name": "team"}


@contextmanager
def serve() -> Iterator[Server]:
    """Run the server on a free local port."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def read(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

        def say(self, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_PUT(self) -> None:
            self.read()
            state.files.append(self.path.removeprefix("/up/"))
            self.say({})

        def do_POST(self) -> None:
            data = self.read()
            if self.path == "/graphql":
                asked = json.loads(data)
                name = asked.get("operationName") or re.findall(r"(?:query|mutation)\s+(\w+)", asked["query"])[0]
                self.say({"data": state.answer(name, asked.get("variables") or {})})
            else:
                if self.path.endswith("/file_stream"):
                    state.stream(self.path.split("/")[4], json.loads(data).get("files") or {})
                self.say({})

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()
