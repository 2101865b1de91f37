"""Servers on loopback that stand for object stores: one that injects faults, and moto's S3."""

import logging
import os
import random
import re
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

FAULTS = ("503", "429", "cut", "reset", "stall", "wrong_etag", "flip", "wrong_range")


class RangeServer:
    """Serves the files of a folder by HTTP, with ranges, ETags and If-Match, and injects faults into answers to GET.

    It also stands for S3 (`s3_environment(server.address)`): a bucket is a subfolder, and its objects can be listed.

    Args:
        folder: is served.
        rate: the share of GET requests that get a fault.
        kinds: the faults, drawn by `seed`; a number is a status. Bytes of a file are flipped once only, because wrong
            content twice in a row is final.
        stall: seconds that a stalled answer waits before it is cut.
        ranges: whether ranges are served; if not, each answer is the whole file.

    Attributes:
        address: `http://127.0.0.1:<port>`.
        faults: kind → how often it was injected.
        requests: method → how often it was used.
        answers: status → how often it was sent.
        logins: the last requests' Authorization.
        sent: name → the (start, stop) of bytes that were sent, whole or up to a cut, in order.
        planned: faults of the next GET requests, taken before any is drawn; "" is none.
    """

    def __init__(
        self,
        folder: Path,
        rate: float = 0.0,
        kinds: Iterable[str] = FAULTS,
        seed: int = 0,
        stall: float = 0.2,
        ranges: bool = True,
    ):
        self.folder, self.rate, self.kinds, self.stall, self.ranges = folder, rate, tuple(kinds), stall, ranges
        self.faults: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        self.logins: deque[str] = deque(maxlen=100)
        self.planned: deque[str] = deque()
        self.sent: dict[str, list[tuple[int, int]]] = {}
        self._random, self._lock, self._flipped = random.Random(seed), threading.Lock(), set()
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "RangeServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def draw(self, name: str) -> tuple[str, float]:
        """The fault of the next answer about a file, and the share of its body at which it happens."""
        with self._lock:
            fault = self.planned.popleft() if self.planned else ""
            if not fault and self._random.random() < self.rate:
                fault = self._random.choice(self.kinds)
            if fault == "flip" and name in self._flipped:
                fault = "cut"
            if fault == "flip":
                self._flipped.add(name)
            if fault:
                self.faults[fault] += 1
            return fault, self._random.random()

    def record(self, name: str, start: int, stop: int) -> None:
        with self._lock:
            self.sent.setdefault(name, []).append((start, stop))


class _Handler(BaseHTTPRequestHandler):
    owner: RangeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))  # closed unread, the connection would be reset
        self._answer(403, b"")

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        name = unquote(parts.path).strip("/")
        self.owner.requests[self.command] += 1
        self.owner.logins.append(self.headers.get("Authorization", ""))
        if "list-type" in parse_qs(parts.query):
            return self._list(name, parse_qs(parts.query))
        file = self.owner.folder / name
        if not file.is_file():
            return self._answer(404, b"")
        fault, where = self.owner.draw(name) if self.command == "GET" else ("", 0.0)
        if fault.isdigit():  # a text that repeats what was sent, as some servers do
            return self._answer(int(fault), f"<Code>SlowDown</Code>{self.path}\n{self.headers}".encode())
        etag = etag_of(file)
        wanted = self.headers.get("If-Match")
        if wanted not in (None, etag) and fault != "wrong_etag":
            return self._answer(412, b"")
        self._file(name, file, '"another"' if fault == "wrong_etag" else etag, fault, where)

    def _file(self, name: str, file: Path, etag: str, fault: str, where: float) -> None:
        size = file.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.owner.ranges else None
        start, stop = 0, size
        if match:
            start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
            if start >= size:
                return self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
        with file.open("rb") as stream:
            stream.seek(start)
            body = bytearray(stream.read(stop - start) if self.command == "GET" else b"")
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        shift = 1 if fault == "wrong_range" else 0
        if match:
            headers["Content-Range"] = f"bytes {start + shift}-{stop - 1 + shift}/{size}"
        at = int(where * len(body))
        if fault == "flip" and body:
            body[min(at, len(body) - 1)] ^= 0xFF
        end = at if fault in ("cut", "reset", "stall") else len(body)
        if self.command == "GET":
            self.owner.record(name, start, start + end)
        self._answer(206 if match else 200, bytes(body[:end]), headers, stop - start)
        if fault in ("cut", "reset", "stall"):
            self._break(fault)

    def _break(self, fault: str) -> None:
        self.close_connection = True
        self.wfile.flush()
        if fault == "stall":
            self.owner._ended.wait(self.owner.stall)
        if fault == "reset":  # closing with a linger time of 0 sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        """ListObjectsV2 of S3, with a prefix and the delimiter `/`."""
        prefix = query.get("prefix", [""])[0]
        root = self.owner.folder / bucket
        entries = []
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            key = file.relative_to(root).as_posix()
            if key.startswith(prefix) and ("delimiter" not in query or "/" not in key[len(prefix) :]):
                entries.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    f"<ETag>{escape(etag_of(file))}</ETag><Size>{file.stat().st_size}</Size></Contents>"
                )
        head = '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><IsTruncated>false</IsTruncated>'
        self._answer(200, f"{head}{''.join(entries)}</ListBucketResult>".encode(), {"Content-Type": "application/xml"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int = -1) -> None:
        self.owner.answers[status] += 1
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body) if length < 0 else length))
        try:
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
        except OSError:  # the client has gone
            self.close_connection = True


def etag_of(file: Path) -> str:
    """The ETag that the server of a file sends: it follows from the content, as S3's does."""
    status = file.stat()
    return _etag(file, status.st_mtime_ns, status.st_size)


@lru_cache(1024)
def _etag(file: Path, changed: int, size: int) -> str:
    return f'"{md5(file.read_bytes()).hexdigest()}"'


@contextmanager
def s3_environment(address: str) -> Iterator[dict[str, str]]:
    """Set the environment for an S3 server on loopback, also for subprocesses, and put it back."""
    variables = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing-id-0123456789",
        "AWS_SECRET_ACCESS_KEY": "testing-Secret-0123456789",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    try:
        for name in before:
            del os.environ[name]
        os.environ.update(variables)
        yield variables
    finally:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[Any]:
    """moto's S3 server with an empty bucket, the environment set to it; yields a boto3 client."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with s3_environment(f"http://{host}:{port}") as variables:
            client = boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"])
            client.create_bucket(Bucket=bucket)
            yield client
            client.close()
    finally:
        server.stop()
