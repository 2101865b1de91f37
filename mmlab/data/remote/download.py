"""The download of one object: in ranges, again after faults, checked, and complete or not there at all."""

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from mmlab.config.errors import DataError, UserError
from mmlab.data.remote.store import Blob, Store
from mmlab.data.remote.store_errors import ChangedError, StoreFault, UnreachedError, changed
from mmlab.runs.disk import sync_folder, writing

RANGE = 16 << 20  # bytes of one request
CONNECTIONS = 4  # requests at a time
DEADLINE = 600.0  # seconds for one object
# Seconds of the first wait after a fault, and of the longest; each wait is twice the one before, less a random part.
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
T = TypeVar("T")


class Stopped(Exception):
    """The caller ended the download."""


def retried(call: Callable[[], T], deadline: float = 60.0) -> T:
    """Return what `call` returns, called again after each `StoreFault`.

    Raises:
        UnreachedError: it did not succeed within `deadline` seconds; and whatever else `call` raises.
    """
    end, failures = time.monotonic() + deadline, 0
    while True:
        try:
            return call()
        except StoreFault as fault:
            wait = _wait(failures)
            failures += 1
            if time.monotonic() + wait > end:
                raise UnreachedError(f"{_sentence(fault)}, in {failures} attempts within {deadline:g} s.") from None
            time.sleep(wait)


def read_object(store: Store, name: str, deadline: float = 60.0) -> tuple[bytes, Blob]:
    """Read a small object, such as a manifest, whole."""

    def once() -> tuple[bytes, Blob]:
        blob = store.stat(name)
        return store.read(name, 0, blob.size, blob.etag) if blob.size else (b"", blob)

    return retried(once, deadline)


def download(
    store: Store,
    name: str,
    path: Path,
    *,
    size: int | None = None,
    etag: str | None = None,
    deadline: float = DEADLINE,
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int], None] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Blob:
    """Fetch an object to `path`, which is replaced at once when all of it has arrived and is right.

    Until then it grows in `<path>.part`, which only a kill leaves behind; the next download starts it again.

    Args:
        store: the object's store.
        name: the object.
        path: where it goes; its folder exists.
        size: bytes that it must have; None takes what the store says first.
        etag: that it must have; None takes what the store says first.
        deadline: seconds for all of it.
        check: raises a DataError if the content of a file is wrong; then it is fetched once more.
        progress: is given each number of bytes that was received and written, from several threads, one at a time.
        stopped: whether to give up; asked several times a second.

    Raises:
        Stopped: `stopped` said so.
        ChangedError: size or ETag differ.
        DataError: the object is missing or refused, its content is wrong twice, or the deadline passed.
        RunError: the disk is full, or does not let it be written.
    """
    part = path.with_name(f"{path.name}.part")
    end = time.monotonic() + deadline
    try:
        for second in (False, True):
            transfer = _Transfer(store, name, part, end, deadline, progress, stopped)
            blob = transfer.run(size, etag)
            if check is None:
                break
            try:
                check(part)
                break
            except DataError as error:
                if second:
                    text = f"{store.url / name} has wrong content in two downloads: {_sentence(error)}"
                    raise DataError(f"{text}; if it was replaced or damaged, run mmlab shards index --again.") from None
        with writing(path):
            os.replace(part, path)
            sync_folder(path.parent)
        return blob
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


class _Transfer:
    """Threads that fetch the ranges of one object into a file.

    The caller's thread only waits, so a request that hangs holds it no longer than to the deadline. A thread that is
    left behind writes nothing more.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        part: Path,
        end: float,
        deadline: float,
        progress: Callable[[int], None] | None,
        stopped: Callable[[], bool] | None,
    ):
        self.store, self.name, self.part, self.end, self.deadline = store, name, part, end, deadline
        self.progress, self.stopped = progress, stopped
        self.blob: Blob | None = None
        self.ranges: deque[tuple[int, int]] = deque()
        self.left = self.received = self.faults = 0
        self.error: BaseException | None = None
        self.fault = ""
        self.lock, self.ended, self.file = threading.Lock(), threading.Event(), -1

    def run(self, size: int | None, etag: str | None) -> Blob:
        """Fetch all bytes and flush them to the disk."""
        with writing(self.part):
            self.file = os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            if size is None or etag is None:
                self._start([lambda: self._ask(size, etag)])
            else:
                self.blob = Blob(self.name, size, etag)
            assert self.blob is not None
            starts = range(0, self.blob.size, RANGE)
            self.ranges.extend((start, min(start + RANGE, self.blob.size)) for start in starts)
            self._start([self._fetch] * min(CONNECTIONS, len(self.ranges)))
            with writing(self.part):
                os.fsync(self.file)
            return self.blob
        finally:
            with self.lock:  # no thread writes any more
                self.ended.set()
                os.close(self.file)

    def _start(self, tasks: list[Callable[[], None]]) -> None:
        """Run tasks in threads and wait for all, the first error, the deadline or a stop."""
        self.left, done = len(tasks), threading.Event()

        def work(task: Callable[[], None]) -> None:
            try:
                task()
            except BaseException as error:
                with self.lock:
                    self.error = self.error or error
            with self.lock:
                self.left -= 1
                if not self.left or self.error:
                    done.set()

        for task in tasks:
            threading.Thread(target=work, args=(task,), daemon=True).start()
        while tasks and not done.wait(0.1):
            if self.stopped is not None and self.stopped():
                raise Stopped
            if time.monotonic() > self.end:
                raise self._late()
        if self.error is not None:
            raise self.error

    def _late(self) -> DataError:
        of = f" of {self.blob.size}" if self.blob else ""
        last = f"{self.faults} faults, the last: {self.fault}" if self.faults else "the store is slow or hangs"
        return DataError(
            f"{self.store.url / self.name} was not complete after {self.deadline:g} s: {self.received}{of} bytes came,"
            f" {last}."
        )

    def _ask(self, size: int | None, etag: str | None) -> None:
        """Ask the store for the size and the ETag that are not known."""

        def ask() -> None:
            blob = self.store.stat(self.name)
            if (size is not None and blob.size != size) or (etag is not None and blob.etag not in (etag, None)):
                raise changed(str(self.store.url / self.name))
            self.blob = Blob(self.name, blob.size, etag or blob.etag)

        self._retry(ask)

    def _fetch(self) -> None:
        """Fetch ranges until none is left."""
        while True:
            try:
                at, stop = self.ranges.popleft()
            except IndexError:
                return
            place = [at]
            self._retry(lambda place=place, stop=stop: self._fetch_range(place, stop), lambda place=place: place[0])

    def _fetch_range(self, place: list[int], stop: int) -> None:
        """Fetch the rest of a range; `place[0]` is the next byte."""
        assert self.blob is not None
        blob, chunks = self.store.get(self.name, place[0], stop, self.blob.etag)
        if blob.size != self.blob.size:
            raise changed(str(self.store.url / self.name))
        for chunk in chunks:
            if len(chunk) > stop - place[0]:
                raise StoreFault(f"{self.store.url / self.name} cannot be read: more bytes came than were asked for.")
            self._write(chunk, place[0])
            place[0] += len(chunk)
        if place[0] < stop:
            raise StoreFault(f"{self.store.url / self.name} cannot be read: {stop - place[0]} bytes are missing.")

    def _write(self, chunk: bytes, at: int) -> None:
        with self.lock:
            if self.ended.is_set():
                raise Stopped
            view = memoryview(chunk)
            with writing(self.part):
                while view:
                    count = os.pwrite(self.file, view, at)
                    view, at = view[count:], at + count
            self.received += len(chunk)
            if self.progress is not None:
                self.progress(len(chunk))

    def _retry(self, call: Callable[[], None], place: Callable[[], int] = lambda: 0) -> None:
        """Call until it succeeds; waits grow while no byte arrives."""
        failures = 0
        while not self.ended.is_set():
            before = place()
            try:
                return call()
            except ChangedError as error:
                fault = self._contradicted(error)
            except StoreFault as error:
                fault = error
            with self.lock:
                self.faults += 1
                self.fault = _sentence(fault)
            failures = 0 if place() > before else failures + 1
            if failures:
                self.ended.wait(_wait(failures - 1))
        raise Stopped

    def _contradicted(self, error: ChangedError) -> StoreFault:
        """A changed object is final, unless the store denies the change: then it was a wrong answer of a proxy."""
        if self.blob is None:
            raise error
        try:
            now = self.store.stat(self.name)
        except StoreFault as fault:
            return fault
        if now.size == self.blob.size and now.etag == self.blob.etag:
            return StoreFault(f"{_sentence(error)}, but only in one answer")
        raise error


def _wait(failures: int) -> float:
    return min(FIRST_WAIT * 2.0 ** min(failures, 20), LONGEST_WAIT) * random.uniform(0.5, 1.0)


def _sentence(error: UserError) -> str:
    return str(error).partition("; run mmlab")[0].rstrip(".")
