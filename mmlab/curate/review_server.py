"""The review's server: one page, on loopback only, for whoever knows its address.

The address contains a random token that other users and other sites' pages cannot guess. The Host and Origin of each
request are checked as well, against pages whose host name was made to resolve to this machine (DNS rebinding).
"""

import json
import os
import secrets
import signal
import sys
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, RunError
from mmlab.curate.decisions import Review, Stale, Unfit
from mmlab.curate.journal import claim
from mmlab.curate.minigpt4_pipeline import reviewed_images
from mmlab.data.formats import IMAGE_EXTENSIONS
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import SampleError
from mmlab.runs.disk import to_json

LONGEST_BODY = 1 << 20  # bytes
TYPES = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ReviewServer(ThreadingHTTPServer):
    """Serves one review on 127.0.0.1.

    Args:
        review: items and decisions.
        index: their images.
        token: the first part of every path.
        port: 0 for any free port.

    Attributes:
        url: the page's address.

    Raises:
        ConfigError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, review: Review, index: ShardIndex, token: str, port: int = 0):
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ConfigError(f"port {port} is not available ({error.strerror}); use another port=…, or 0.") from None
        self.review, self.index, self.token = review, index, token
        names = [f"{host}:{self.server_port}" for host in ("127.0.0.1", "localhost")]
        self.hosts, self.origins = names, [f"http://{name}" for name in names]
        self.url = f"{self.origins[0]}/{token}/"
        self.page = files("mmlab.curate").joinpath("review.html").read_bytes()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore tabs that were closed during a response."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds; an idle connection blocks a thread

    def do_GET(self) -> None:
        review, path = self.server.review, self._path()
        if path is None:
            return
        what, _, number = path.partition("/")
        item = int(number) if number.isdecimal() and int(number) < len(review.items) else None
        if path == "":
            self._send(200, self.server.page, "text/html; charset=utf-8")
        elif path == "state":
            self._respond(200, review.state())
        elif what == "item" and item is not None:
            self._respond(200, review.item(item))
        elif what == "picture" and item is not None:
            self._image(item)
        else:
            self._respond(404, {"error": "There is nothing here."})

    def do_POST(self) -> None:
        path = self._path()
        body = None if path is None else self._json()
        if body is None:
            return
        try:
            if path == "decide":
                i = int(body["i"])
                action, text, key, proposed = (str(body[name]) for name in ("action", "text", "key", "proposed"))
                self.server.review.decide(i, action, text, key, proposed, int(body["seen"]))
            elif path == "undo":
                i = self.server.review.undo(int(body["last"]))
            else:
                return self._respond(404, {"error": "There is nothing here."})
        except Stale:
            return self._respond(409, {"error": "It has changed since you saw it."})
        except Unfit as error:
            return self._respond(400, {"error": str(error)})
        except RunError as error:
            return self._respond(507, {"error": f"Not saved: {error}"})
        except (KeyError, ValueError, TypeError, IndexError):
            return self._respond(400, {"error": "The request is not a decision."})
        self._respond(200, {"i": i, "state": self.server.review.state()})

    def _path(self) -> str | None:
        """The path after the token; None, after a response, for a request that is not allowed."""
        allowed = self.headers.get("Host") in self.server.hosts
        allowed &= self.headers.get("Origin") in (None, *self.server.origins)
        allowed &= self.headers.get("Sec-Fetch-Site") in (None, "none", "same-origin")
        _, token, *rest = self.path.split("?")[0].split("/", 2)
        if allowed and secrets.compare_digest(token.encode(), self.server.token.encode()) and rest:
            return rest[0]
        self.close_connection = True  # the rest of the request is not read
        self._respond(403, {"error": "Open the address that `mmlab curate review` prints."})
        return None

    def _json(self) -> dict[str, Any] | None:
        """The JSON object of a request; None, after a response, for anything else."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() == "application/json" and length.isdecimal() and int(length) < LONGEST_BODY:
            try:
                body = json.loads(self.rfile.read(int(length)))
                if isinstance(body, dict):
                    return body
            except ValueError:
                pass
        self.close_connection = True
        self._respond(400, {"error": "The request is not a JSON object."})
        return None

    def _image(self, i: int) -> None:
        try:
            members = self.server.index.read(self.server.review.items[i]["sample"], IMAGE_EXTENSIONS)
            extension, data = next(iter(members.items()))
        except (SampleError, StopIteration) as error:
            return self._respond(404, {"error": str(error)})
        self._send(200, data, TYPES[extension])

    def _respond(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, to_json(body).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            **{"Content-Type": kind, "Content-Length": str(len(data)), "Cache-Control": "no-store"},
            **{"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"},
            **{"Content-Security-Policy": POLICY, "Cross-Origin-Resource-Policy": "same-origin"},
        }
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, so that the terminal shows only the address."""


def serve(out: Path, port: int, open_browser: bool = False) -> None:
    """Serve the review of a curation until Ctrl-C or SIGTERM, then print the counts of decisions.

    Raises:
        ConfigError: `out` is not a curation, or the port is taken.
        RunError: there is nothing to review yet, or another process serves this review.
    """
    index = reviewed_images(out)
    with closing(claim(out / ".review.lock", "serves the review of")):
        review = Review(out)
        with ReviewServer(review, index, token_of(out), port) as server, _until_interrupted():
            print(f"{len(review.items)} descriptions to review: {server.url}   (Ctrl-C ends)", flush=True)
            if open_browser:
                webbrowser.open(server.url)
            server.serve_forever()
        counts = review.state()
        print(", ".join(f"{name} {counts[name]}" for name in ("accepted", "edited", "rejected", "left")))


@contextmanager
def _until_interrupted() -> Iterator[None]:
    """End the block at SIGINT or SIGTERM, without an error."""
    if threading.current_thread() is not threading.main_thread():  # others receive no signals
        yield
        return
    interrupted, ended = (signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
    if interrupted is signal.SIG_IGN:  # so a shell without a terminal starts background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGINT, interrupted)
        signal.signal(signal.SIGTERM, ended)


def token_of(out: Path) -> str:
    """The review's token, created once, so that an open tab still works after the server is restarted."""
    path = out / ".review.token"
    if not path.exists() or path.stat().st_size < 32:
        draft = path.with_name(f".review.token.{os.getpid()}")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(24))
        draft.replace(path)
    return path.read_text(encoding="ascii")
