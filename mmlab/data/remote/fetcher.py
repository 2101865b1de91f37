"""The process that fetches remote shards into a cache folder, for all readers of a machine that use the folder.

Readers start it themselves: `python -m mmlab.data.remote.fetcher FOLDER --limit BYTES`. It ends when nobody has been
connected for a while. It may be killed at any time: readers start another, which takes over the files.
"""

import argparse
import fcntl
import itertools
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mmlab.config.errors import DataError, UserError
from mmlab.data.remote.fetch_queue import PATIENCE, FetchQueue
from mmlab.data.remote.shard_cache import ShardCache
from mmlab.data.remote.wanted import Wanted
from mmlab.data.remote.wire import LOCK, LOG, PROTOCOL, SOCKET, Wire, socket_address, store_settings
from mmlab.runs.disk import writing

# A cluster sends them to every process of a job; a run that saves its state still reads shards.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_LOG_BYTES = 1 << 20
_GRACE = 120.0  # seconds after its deadline in which a call must have ended; drivers of fsspec may hang
_TICK = 0.2  # seconds between looks at whether to end
T = TypeVar("T")


class Fetcher:
    """Serves the connections to a cache folder; the caller holds the lock of the folder.

    Args:
        folder: of the cache.
        limit: bytes of the cache as long as no client states its own.
        idle: seconds without a connection after which it ends.
        patience: see `FetchQueue`.
    """

    def __init__(self, folder: Path, limit: int, idle: float, patience: float = PATIENCE):
        self._folder = folder
        self._idle = idle
        self._queue = FetchQueue(ShardCache(folder, limit), patience)
        self._settings = store_settings()
        self._numbers = itertools.count()
        self._connected: set[int] = set()
        self._retired = False
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        with suppress(FileNotFoundError):
            os.unlink(folder / SOCKET)
        before = os.umask(0o177)
        try:
            with socket_address(folder) as address:
                self._socket.bind(address)
        finally:
            os.umask(before)
        self._socket.listen(1024)
        self._socket.settimeout(_TICK)

    def serve(self, is_ours: Callable[[], bool]) -> None:
        """Accept connections until there is no more use for it.

        Args:
            is_ours: whether the folder still is the one that was locked; it ends otherwise.
        """
        used = time.monotonic()
        while not self._retired and is_ours():
            with suppress(TimeoutError):
                connection, _ = self._socket.accept()
                connection.settimeout(None)
                number = next(self._numbers)
                with self._lock:
                    self._connected.add(number)
                threading.Thread(target=self._talk, args=(number, Wire(connection)), daemon=True).start()
            if self._connected:
                used = time.monotonic()
            elif time.monotonic() - used > self._idle:
                break
        if is_ours():
            with suppress(OSError):
                os.unlink(self._folder / SOCKET)

    def _talk(self, client: int, wire: Wire) -> None:
        """Answer one connection until it ends; whatever it wants ends with it."""
        try:
            while True:
                request, _ = wire.receive()
                try:
                    answer, data = self._answer(client, wire, request)
                except UserError as error:
                    answer, data = {"error": str(error)}, b""
                except (KeyError, TypeError, ValueError) as error:
                    answer, data = {"error": f"the fetcher cannot read a request ({error!r})."}, b""
                wire.send(answer, data)
        except (OSError, EOFError, ValueError):
            pass
        finally:
            wire.close()
            self._queue.leave(client)
            with self._lock:
                self._connected.discard(client)

    def _answer(self, client: int, wire: Wire, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        do = request["do"]
        if do == "hello":
            return self._hello(client, request), b""
        if do == "want":
            self._queue.want(client, *([Wanted.from_json(e) for e in request[name]] for name in _LISTS))
        elif do == "file":
            entry = Wanted.from_json(request["entry"])
            path, hit = self._queue.file(client, entry, request["again"], lambda: wire.send({"wait": True}))
            return {"path": str(path), "hit": hit}, b""
        elif do == "range":
            entry, span = Wanted.from_json(request["entry"]), (request["start"], request["stop"])
            call = partial(self._queue.range, entry, *span)
            return {}, _while_waiting(call, request["deadline"], wire, f"{entry.set}/{entry.name}")
        elif do == "stat":
            place = request["set"], request["name"]
            size, etag = _while_waiting(partial(self._queue.stat, *place), request["deadline"], wire, "/".join(place))
            return {"size": size, "etag": etag}, b""
        elif do == "stats":
            return {**self._queue.stats(), "process": os.getpid()}, b""
        else:
            raise ValueError(do)
        return {}, b""

    def _hello(self, client: int, request: dict[str, Any]) -> dict[str, Any]:
        if request["protocol"] != PROTOCOL or request["settings"] != self._settings:
            with self._lock:
                self._retired |= len(self._connected) == 1
            if self._retired:
                return {"retired": True}
            version = request["protocol"] != PROTOCOL
            what = "another version of mmlab" if version else "other credentials or endpoints of object stores"
            return {
                "error": f"the fetcher of {self._folder} (process {os.getpid()}) has {what}, and others use it; "
                "give another folder as data.cache.folder, or wait for them."
            }
        self._queue.join(client, request["limit"], request["deadline"])
        return {"process": os.getpid()}


_LISTS = ("present", "next", "ahead")


def _while_waiting(call: Callable[[float], T], deadline: float, wire: Wire, where: str) -> T:
    """Return what a slow call returns, and meanwhile tell the client that it is under way.

    Raises:
        DataError: it has not ended long after its deadline; and whatever it raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call(deadline))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    end = time.monotonic() + deadline + _GRACE
    thread.join(1.0)
    while thread.is_alive():
        if time.monotonic() > end:
            raise DataError(f"{where} cannot be read: its driver has not answered for {deadline + _GRACE:g} s.")
        wire.send({"wait": True})
        thread.join(1.0)
    if errors:
        raise errors[0]
    return results[0]


def main(argv: list[str] | None = None) -> None:
    """Serve a folder in the background; returns when the socket listens, or when another process serves it."""
    parser = argparse.ArgumentParser(prog="python -m mmlab.data.remote.fetcher")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--idle", type=float, default=10.0)
    parser.add_argument("--patience", type=float, default=PATIENCE)
    args = parser.parse_args(argv)
    reading, status = os.pipe()
    if os.fork():  # a daemon has no parent that must wait for it, and that is killed with it
        os.close(status)
        with os.fdopen(reading, "r", encoding="utf-8", errors="replace") as file:
            sys.exit(file.read() or None)
    os.close(reading)
    try:
        _serve(args.folder.absolute(), args.limit, args.idle, args.patience, status)
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # once it listens, `status` is closed
            os.write(status, sentence.encode(errors="replace"))
        print(sentence, file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(0)  # threads of downloads may be in the middle of something


def _serve(folder: Path, limit: int, idle: float, patience: float, status: int) -> None:
    """Lock the folder, serve it, and close `status` when the socket listens; returns if another process has it."""
    os.setsid()
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        fetcher = Fetcher(folder, limit, idle, patience)
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDWR)
    for number, target in ((0, null), (1, null), (2, log)):
        os.dup2(target, number)
    os.close(status)

    def is_ours() -> bool:
        with suppress(OSError):
            if os.fstat(2).st_size > _LOG_BYTES:
                os.ftruncate(2, 0)
            (folder / SOCKET).lstat()
            return (folder / LOCK).stat().st_ino == os.fstat(lock).st_ino
        return False

    fetcher.serve(is_ours)


if __name__ == "__main__":
    main()
