"""A chat-completions endpoint on loopback whose faults are scripted."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[str, int], str]
"""(prompt, number of earlier requests with it) → what happens: `ok`, a status, or a name in `serve` or `_say`."""

DRIPS = {
    "drip": (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", b" "),
    "drip a status": (b"", b"H"),
    "drip a header": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "drip headers": (b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"),
    "drip 100": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "drip a chunk size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "drip an error": (b"HTTP/1.1 400 Bad\r\nContent-Length: 900\r\n\r\n", b" "),
}
"""Replies that never end: how they begin, and what is sent every 0.05 s."""


def always(*acts: str) -> Script:
    """The acts in turn for each prompt; the last one repeats."""
    return lambda prompt, attempt: acts[min(attempt, len(acts) - 1)]


class ScriptedEndpoint:
    """A context manager that replies `repaired: <last line of the prompt>` where the script returns `ok`.

    Args:
        script: what happens to each request.
        headers: sent with a status.
        answer: prompt → reply, instead of the one above.
        words: messages → the prompt that `script` and `answer` receive and that is counted.

    Attributes:
        url: base address.
        asked: prompts in order of arrival.
        paid: prompt → number of replies.
        tokens: total of all replies and their prompts.
        headers, bodies, times: of the requests, in order; times are monotonic seconds.
    """

    def __init__(
        self,
        script: Script = always("ok"),  # noqa: B008
        headers: dict[str, str] | None = None,
        answer=None,
        words: Callable[[list[dict[str, str]]], str] = lambda messages: messages[-1]["content"],
    ):
        self.script, self.extra, self.words = script, headers or {}, words
        self.answer = answer or (lambda prompt: f"repaired: {prompt.splitlines()[-1]}")
        self.asked: list[str] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.paid: Counter[str] = Counter()
        self.tokens = 0
        self.released = threading.Event()
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client was killed or closed the connection

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> "ScriptedEndpoint":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def wait_for(self, requests: int, seconds: float = 60.0) -> None:
        """Wait for a number of requests; the thread that receives one may lag behind the client."""
        end = time.monotonic() + seconds
        while len(self.asked) < requests:
            assert time.monotonic() < end, f"{len(self.asked)} requests of {requests}"
            time.sleep(0.005)

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        prompt = self.words(body["messages"])
        with self.lock:
            attempt = self.asked.count(prompt)
            self.asked.append(prompt)
            self.times.append(time.monotonic())
            self.headers.append(dict(request.headers))
            self.bodies.append({**body, "path": request.path})
        act = self.script(prompt, attempt)
        if act == "late":
            time.sleep(0.1)
        if act == "hang":
            self.released.wait(20)
        elif act == "drop":
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
        elif act in DRIPS:
            self._drip(request, *DRIPS[act])
        elif act.isdigit():
            self._send(request, int(act), json.dumps({"error": {"message": f"scripted {act}\nhere"}}), self.extra)
        elif act == "garbage":
            self._send(request, 200, "<html>busy</html>")
        elif act == "other json":
            self._send(request, 200, '{"choices": [{"message": {"content": ["?"]}}]}')
        else:
            self._say(request, body, prompt, act)

    def _say(self, request: BaseHTTPRequestHandler, body: dict[str, Any], prompt: str, act: str) -> None:
        text = {"empty": " \n", "cut": "half of", "cut short": "\n", "filtered": "\n"}.get(act) or self.answer(prompt)
        choice = {
            "message": {"role": "assistant", "content": text},
            "finish_reason": {"cut": "length", "cut short": "length", "filtered": "content_filter"}.get(act, "stop"),
        }
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        with self.lock:
            self.paid[prompt] += 1
            self.tokens += sum(usage.values())
        self._send(request, 200, json.dumps({"model": body["model"] + "-0613", "choices": [choice], "usage": usage}))

    def _drip(self, request: BaseHTTPRequestHandler, start: bytes, piece: bytes) -> None:
        request.wfile.write(start)
        while not self.released.wait(0.05):
            request.wfile.write(piece)
            request.wfile.flush()

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, text: str, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(text.encode())))
        request.end_headers()
        request.wfile.write(text.encode())


def user(*words: str) -> Sequence[dict[str, str]]:
    return [{"role": "user", "content": "\n".join(words)}]
