"""HTTP calls that end at a deadline, whatever the server does.

A socket's timeout starts again with each byte, so a server that drips headers, interim responses, chunk sizes or a TLS
handshake holds a call for hours. Here the call runs in a thread, and its connection is cut at the deadline.
"""

import http.client
import socket
import threading
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def call(work: Callable[["Cut"], T], seconds: float) -> T:
    """Return what `work` returns, or raise what it raises.

    Args:
        work: makes the call with the `Cut` in the request's attribute `cut`, see `handlers`.
        seconds: after which its connections are cut.

    Raises:
        TimeoutError: it has not ended then.
    """
    cut, outcome = Cut(), []

    def run() -> None:
        try:
            outcome.append((work(cut), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    late = not outcome
    cut.end(broken=late)
    if late:
        raise TimeoutError
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


class Cut:
    """The connections of one call."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._ended = False
        self._lock = threading.Lock()

    def add(self, connection: socket.socket) -> None:
        """Watch a connection: by a copy of its descriptor, because TLS takes the original away."""
        with self._lock:
            self._sockets.append(connection.dup())
            ended = self._ended
        if ended:
            self.end(broken=True)

    def end(self, broken: bool) -> None:
        """Forget the connections; with `broken`, reading from them and writing to them fails at once."""
        with self._lock:
            sockets, self._sockets, self._ended = self._sockets, [], True
        for each in sockets:
            if broken:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            each.close()


def handlers() -> list[urllib.request.BaseHandler]:
    """Handlers for an opener whose requests have an attribute `cut`."""
    return [_HTTP(), _HTTPS()]


def _watched(kind: Callable[..., Any], cut: Cut) -> Callable[..., Any]:
    def connection(*args: Any, **kwargs: Any) -> Any:
        made = kind(*args, **kwargs)
        create = made._create_connection

        def connect(*args: Any, **kwargs: Any) -> socket.socket:
            connected = create(*args, **kwargs)
            cut.add(connected)
            return connected

        made._create_connection = connect
        return made

    return connection


class _HTTP(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_watched(http.client.HTTPConnection, req.cut), req)


class _HTTPS(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_watched(http.client.HTTPSConnection, req.cut), req, context=self._context)  # type: ignore[attr-defined]
