"""A reader's connection to the fetcher of a cache folder, which it starts if none runs."""

import os
import platform
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Any

import mmlab
from mmlab.config.errors import DataError, RunError
from mmlab.data.remote.wanted import Wanted
from mmlab.data.remote.wire import LOCK, LOG, PROTOCOL, Wire, socket_address, store_settings

IDLE = 10.0
"""Seconds that a fetcher stays when the last reader has gone."""
_SILENCE = 60.0  # a fetcher that waits for a store says so every second
_START = 60.0
_OPENING = 60.0  # of `deadline`, until the first answer of a store
_DEATHS = 20  # of fetchers in one request
_PIECE = 1 << 26


class FetchClient:
    """Asks the fetcher of a cache folder for objects of remote sets.

    It may be used from several threads, which then wait for each other. A forked or unpickled copy connects anew and
    wants nothing. When the fetcher was killed, the next request starts another, which hears what this client wants.

    Args:
        folder: of the cache.
        limit: bytes of the cache.
        deadline: seconds for each object.
        idle: seconds that a fetcher which this client starts stays without clients.

    Raises:
        DataError: by every request, for what the fetcher cannot do.
        RunError: by every request, if the fetcher does not start or does not answer.
    """

    def __init__(self, folder: Path, limit: int, deadline: float, idle: float = IDLE):
        self.folder = folder.expanduser().resolve()
        self.limit = limit
        self.deadline = deadline
        self.idle = idle
        self._forget()
        _CLIENTS.add(self)

    def __reduce__(self):
        return FetchClient, (self.folder, self.limit, self.deadline, self.idle)

    def want(self, present: Sequence[Wanted], next: Sequence[Wanted] = (), ahead: Sequence[Wanted] = ()) -> None:
        """Replace what this client wants, each list in the order of use; the tables of shards follow from them.

        Files of an object that is no longer in `present` must be closed before: it may be evicted.

        Args:
            present: what is read now; never evicted.
            next: what is read after that.
            ahead: what is read later; evicted first.
        """
        lists = {"present": present, "next": next, "ahead": ahead}
        wants = {name: [entry.as_json() for entry in entries] for name, entries in lists.items()}
        with self._lock:
            self._wants = None
            self._ask({"do": "want", **wants})
            self._wants = {"do": "want", **wants}

    def file(self, entry: Wanted, again: bool = False) -> Path:
        """Return the path of an object's copy, when it is there; it stays until this client's next `want` or `file`.

        Args:
            entry: need not be wanted.
            again: compare the copy with its checksums again, since a reader found wrong bytes.
        """
        return Path(self._ask({"do": "file", "entry": entry.as_json(), "again": again})[0]["path"])

    def range(self, entry: Wanted, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` of an object without adding it to the cache."""
        request = {"do": "range", "entry": entry.as_json(), "deadline": self.deadline}
        parts = [(at, min(at + _PIECE, stop)) for at in range(start, stop, _PIECE)]
        return b"".join(self._ask({**request, "start": low, "stop": high})[1] for low, high in parts)

    def stat(self, address: str, name: str) -> tuple[int, str | None]:
        """Return size and ETag of an object; there may be no ETag.

        Sets are opened with it: a store that is not there at all is an error sooner than one that fails later.
        """
        deadline = min(self.deadline, _OPENING)
        answer, _ = self._ask({"do": "stat", "set": address, "name": name, "deadline": deadline})
        return answer["size"], answer["etag"]

    def read(self, address: str, name: str) -> bytes:
        """Return a small object whose size is not known, such as a manifest."""
        size, etag = self.stat(address, name)
        return self.range(Wanted(address, name, size, etag), 0, size)

    def stats(self) -> dict[str, Any]:
        """The fetcher's numbers since it started, see `FetchQueue.stats`, and its process id."""
        return self._ask({"do": "stats"})[0]

    def renew(self) -> None:
        """Tell a new fetcher what this client wants, if the one before has ended."""
        with self._lock:
            if self._wire is not None and self._wire.ended():
                self._drop()
                if self._wants is not None:
                    self.stats()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        with self._lock:
            self._drop()

    def _forget(self) -> None:
        """Start without a connection and without wishes, as in a forked process."""
        self._lock = threading.RLock()
        self._wire: Wire | None = None
        self._wants: dict[str, Any] | None = None

    def _drop(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            with suppress(OSError):
                wire.close()

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Return the answer to a request, which is repeated when the fetcher dies."""
        with self._lock:
            for _ in range(_DEATHS):
                try:
                    if self._wire is None:
                        self._wire = self._connect()
                        if self._wants is not None:
                            _exchange(self._wire, self._wants)
                    return _exchange(self._wire, request)
                except TimeoutError:
                    self._drop()
                    raise RunError(f"{self._owner()} has not answered for {_SILENCE:g} s; end that process.") from None
                except (OSError, EOFError, ValueError):
                    self._drop()
                except DataError:
                    raise
                except BaseException:
                    self._drop()  # interrupted: the answer would come to the next request
                    raise
        raise RunError(f"the fetcher of {self.folder} died {_DEATHS} times in a row; see {self.folder / LOG}.")

    def _connect(self) -> Wire:
        """Connect to the fetcher, and start it if nobody listens."""
        end = time.monotonic() + _START
        while time.monotonic() < end:
            wire = None
            try:
                connection = socket(AF_UNIX)
                wire = Wire(connection)
                connection.settimeout(_SILENCE)
                with socket_address(self.folder) as address:
                    connection.connect(address)
                hello = {"do": "hello", "protocol": PROTOCOL, "settings": store_settings()}
                answer, _ = _exchange(wire, {**hello, "limit": self.limit, "deadline": self.deadline})
                if "retired" not in answer:
                    return wire
                wire.close()
                time.sleep(0.05)
            except (OSError, EOFError):
                if wire is not None:
                    wire.close()
                self._start()
            except BaseException:
                if wire is not None:
                    wire.close()
                raise
        raise RunError(f"{self._owner()} does not answer; end that process.")

    def _start(self) -> None:
        """Start a fetcher; returns when it listens, or when another process is the fetcher of the folder."""
        root = str(Path(str(mmlab.__file__)).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        options = ["--limit", str(self.limit), "--idle", str(self.idle)]
        try:
            result = subprocess.run(
                [sys.executable, "-P", "-m", "mmlab.data.remote.fetcher", str(self.folder), *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
                timeout=_START,
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"the fetcher of {self.folder} has not started within {_START:g} s.") from None
        if result.returncode > 0:  # below 0 somebody ended it; the caller tries again
            reason = (result.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1].rstrip(".")
            raise RunError(f"the fetcher of {self.folder} cannot start: {reason}.")
        node = self._lock_text().partition(" on ")[2]
        if node and node != platform.node():
            raise RunError(
                f"the cache folder {self.folder} is used by {node}; give each machine one on a disk of its own, as "
                "data.cache.folder or $MMLAB_SHARD_CACHE."
            )
        time.sleep(0.05)

    def _owner(self) -> str:
        return f"the fetcher of {self.folder} ({self._lock_text() or 'unknown process'})"

    def _lock_text(self) -> str:
        with suppress(OSError):
            return (self.folder / LOCK).read_text(encoding="utf-8", errors="replace")
        return ""


def _exchange(wire: Wire, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    wire.send(request)
    while (answer := wire.receive())[0].get("wait"):
        pass
    if "error" in answer[0]:
        raise DataError(answer[0]["error"])
    return answer


_CLIENTS: "weakref.WeakSet[FetchClient]" = weakref.WeakSet()


def _after_fork() -> None:
    for client in list(_CLIENTS):
        with suppress(OSError):
            if client._wire is not None:  # the reader of lines may be locked by a thread that is not in this process
                os.close(client._wire.socket.detach())
        client._forget()


os.register_at_fork(after_in_child=_after_fork)
