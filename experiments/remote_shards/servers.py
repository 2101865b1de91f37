"""Servers in processes of their own: servers.py range FOLDER|moto FOLDER|seaweedfs WEED STATE FOLDER|proxy ADDRESS.

`range` is the test suite's server of files, `moto` and `seaweedfs` are S3 servers with the files of a folder, `proxy`
passes requests on to another server. `--faults RATE` injects faults into answers of `range` and `proxy`; `--rate BYTES`
and `--latency SECONDS` slow each connection of a proxy down. A server prints its address, serves until its standard
input ends, and then prints the faults that it injected.
"""

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.tiny_servers import FAULTS, RangeServer, _Handler

KEYS = {"accessKey": "experiment-id-0123", "secretKey": "experiment-Secret-0123"}
BUCKET = "bucket"
LONG_STALL = 20.0
"""Seconds without a byte of one stall in twenty: more than the reader waits."""
_PIECE = 1 << 16
_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection"}


class FaultyServer(RangeServer):
    """The test suite's server, with some stalls that last."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients are killed

    @property
    def stall(self) -> float:
        return LONG_STALL if random.random() < 0.05 else 0.2

    @stall.setter
    def stall(self, _: float) -> None:
        pass


class Proxy(FaultyServer):
    """Passes requests on to a server, whatever it is, and injects faults into the answers to GET.

    A byte of an object is flipped again only after the object was sent whole and right.

    Args:
        upstream: address of the server.
        rate: share of the answers with a fault.
        bytes_per_second: limit of each connection; 0: none.
        latency: seconds before each answer.
    """

    def __init__(self, upstream: str, rate: float, bytes_per_second: float = 0, latency: float = 0, seed: int = 0):
        super().__init__(Path(), rate, FAULTS, seed)
        self.upstream, self.bytes_per_second, self.latency = urlsplit(upstream), bytes_per_second, latency
        self._server.RequestHandlerClass = type("Handler", (_ProxyHandler,), {"owner": self})

    def sent_right(self, name: str) -> None:
        """Note that an object was sent up to its end without a fault."""
        with self._lock:
            self._flipped.discard(name)


class _ProxyHandler(_Handler):
    owner: Proxy

    def do_GET(self) -> None:
        self.pass_on()

    do_PUT = do_POST = do_DELETE = do_GET

    def pass_on(self) -> None:
        owner, name = self.owner, unquote(urlsplit(self.path).path).strip("/")
        owner.requests[self.command] += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            status, headers, data = self._ask(body)
        except (OSError, HTTPException):
            return self._answer(502, b"")
        time.sleep(owner.latency)
        faulty = (
            self.command == "GET" and status in (200, 206) and "list-type" not in parse_qs(urlsplit(self.path).query)
        )
        fault, where = owner.draw(name) if faulty else ("", 0.0)
        if fault in ("503", "429"):
            return self._answer(int(fault), b"Slow down")
        length = int(headers.get("Content-Length", len(data)))
        whole = bytearray(data)
        at = int(where * len(whole))
        if fault == "flip" and whole:
            whole[min(at, len(whole) - 1)] ^= 0xFF
        if fault == "wrong_etag":
            headers["ETag"] = '"another"'
        if fault == "wrong_range" and "Content-Range" in headers:
            start, rest = headers["Content-Range"].removeprefix("bytes ").split("-", 1)
            stop, size = rest.split("/")
            headers["Content-Range"] = f"bytes {int(start) + 1}-{int(stop) + 1}/{size}"
        end = at if fault in ("cut", "reset", "stall") else len(whole)
        if not self._send(status, headers, length, bytes(whole[:end])):
            return None
        if fault in ("cut", "reset", "stall"):
            self._break(fault)
        elif faulty and not fault and _is_end(headers):
            owner.sent_right(name)
        return None

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The upstream's answer; the request keeps its Host, which S3's signature covers."""
        connection = HTTPConnection(self.owner.upstream.hostname or "", self.owner.upstream.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():
                if key.lower() not in _HOP:
                    connection.putheader(key, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            data = answer.read()
            names = {"etag": "ETag", "content-range": "Content-Range", "content-length": "Content-Length"}
            headers = {names.get(k.lower(), k): v for k, v in answer.getheaders() if k.lower() not in _HOP}
            return answer.status, headers, data
        finally:
            connection.close()

    def _send(self, status: int, headers: dict[str, str], length: int, data: bytes) -> bool:
        """Send an answer at the connection's rate; False if the client has gone."""
        self.send_response_only(status)
        for key, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(key, value)
        try:
            self.end_headers()
            if self.command == "HEAD":
                return True
            begun, rate = time.monotonic(), self.owner.bytes_per_second
            for start in range(0, len(data), _PIECE):
                self.wfile.write(data[start : start + _PIECE])
                if rate:
                    time.sleep(max(0.0, begun + (start + _PIECE) / rate - time.monotonic()))
        except OSError:
            self.close_connection = True
            return False
        return True


def _is_end(headers: dict[str, str]) -> bool:
    """Whether an answer holds the last byte of its object."""
    if "Content-Range" not in headers:
        return True
    stop, size = headers["Content-Range"].partition("-")[2].split("/")
    return int(stop) + 1 == int(size)


@contextmanager
def server(*arguments: str | Path | float) -> Iterator["Running"]:
    """A server in a process of its own, until the end of the block."""
    command = [sys.executable, __file__, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    running = Running(process.stdout.readline().strip())
    assert running.address, f"{arguments} did not start"
    try:
        yield running
    finally:
        process.stdin.close()
        running.faults = Counter(json.loads(process.stdout.readline() or "{}"))
        process.wait()


class Running:
    """A server that runs: its address, and when it has ended the faults that it injected."""

    def __init__(self, address: str):
        self.address = address
        self.faults: Counter[str] = Counter()

    def environment(self) -> dict[str, str]:
        """The variables with which S3 clients use it."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": KEYS["accessKey"],
            "AWS_SECRET_ACCESS_KEY": KEYS["secretKey"],
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def upload(address: str, folder: Path) -> None:
    """Create the bucket and put all files of a folder there."""
    import boto3

    keys = {"aws_access_key_id": KEYS["accessKey"], "aws_secret_access_key": KEYS["secretKey"]}
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=BUCKET)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(file), BUCKET, file.relative_to(folder).as_posix())
    client.close()


def free_ports(count: int) -> list[int]:
    """Ports that are free, also with 10,000 added, where SeaweedFS listens too."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(20_000, 50_000)
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            if port not in ports:
                ports.append(port)
    return ports


@contextmanager
def moto() -> Iterator[str]:
    """moto's S3 server; yields its address."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        running.stop()


@contextmanager
def seaweedfs(program: str, folder: Path) -> Iterator[str]:
    """A SeaweedFS server with a new folder that checks signatures; yields the address of its S3 server."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    identity = {"name": "experiment", "credentials": [KEYS], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3 = free_ports(4)
    ports = {"master.port": master, "volume.port": volume, "filer.port": filer, "s3.port": s3}
    options = {**ports, "ip": "127.0.0.1", "dir": str(folder), "s3.config": str(folder / "s3.json")}
    options |= {"master.telemetry": "false", "s3.port.iceberg": 0, "s3.port.lance": 0, "volume.max": 100}
    with (folder / "log").open("wb") as log:
        arguments = [f"-{name}={value}" for name, value in options.items()]
        process = subprocess.Popen([program, "server", "-s3", *arguments], stdout=log, stderr=log, cwd=folder)
    try:
        _wait_for_s3(f"http://127.0.0.1:{s3}", process, folder / "log")
        yield f"http://127.0.0.1:{s3}"
    finally:
        process.kill()  # it takes half a minute to end by itself
        process.wait()


def _wait_for_s3(address: str, process: Any, log: Path) -> None:
    import boto3

    keys = {"aws_access_key_id": KEYS["accessKey"], "aws_secret_access_key": KEYS["secretKey"]}
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with suppress(Exception):
            boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys).create_bucket(Bucket="probe")
            return
        time.sleep(0.5)
    raise RuntimeError(f"SeaweedFS did not start: {log.read_text(errors='replace')[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("range", "moto", "seaweedfs", "proxy"))
    parser.add_argument("what", nargs="+")
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kind in ("moto", "seaweedfs"):
        store = moto() if args.kind == "moto" else seaweedfs(args.what[0], Path(args.what[1]).resolve())
        with store as address:
            upload(address, Path(args.what[-1]))
            print(address, flush=True)
            sys.stdin.read()
        print("{}", flush=True)
        return
    if args.kind == "range":
        running: RangeServer = FaultyServer(Path(args.what[0]), args.faults, seed=args.seed)
    else:
        running = Proxy(args.what[0], args.faults, args.rate, args.latency, args.seed)
    with running:
        print(running.address, flush=True)
        sys.stdin.read()
        print(json.dumps(running.faults), flush=True)
    os._exit(0)  # connections may be open


if __name__ == "__main__":
    main()
