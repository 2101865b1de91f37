"""The downloads of a fetcher: threads that fill the shard cache in the order in which clients need its objects."""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmlab.config.disk_errors import refusal
from mmlab.config.errors import DataError, UserError
from mmlab.config.locations import Url
from mmlab.data.remote.copy_check import check_copy
from mmlab.data.remote.download import Stopped, download, retried
from mmlab.data.remote.shard_cache import AHEAD, PRESENT, ShardCache, too_small
from mmlab.data.remote.store import Store, open_store
from mmlab.data.remote.wanted import Wanted, objects_of
from mmlab.runs.redact import redact_text

DOWNLOADS = 4
"""Objects that are fetched at the same time; one more if it is of a present block."""
PATIENCE = 30.0
"""Seconds in which other clients may go on to their next blocks before one that finds no place gets an error."""


class FetchQueue:
    """Fetches what clients want into the cache; all methods may be called from any thread.

    Args:
        cache: used by nobody else.
        patience: see `PATIENCE`.
    """

    def __init__(self, cache: ShardCache, patience: float = PATIENCE):
        self._cache = cache
        self._patience = patience
        self._stores: dict[str, Future[Store]] = {}  # a chain of credentials may be slow, a driver may hang
        self._opening = threading.Lock()
        self._threads = ThreadPoolExecutor(64)
        self._changed = threading.Condition()  # its lock guards everything below
        self._limits: dict[int, tuple[int, float]] = {}  # client → bytes of the cache, seconds per object
        self._limit = cache.limit
        self._failures: dict[str, tuple[int, str]] = {}  # path → (number, sentence) of the last failure
        self._failed = self._active = self._hits = self._misses = self._bytes = 0
        self._asked: set[str] = set()  # paths of what was asked for since it is wanted
        self._seconds = self._since = 0.0  # of the time in which anything was fetched
        for least in [AHEAD] * DOWNLOADS + [PRESENT]:
            threading.Thread(target=self._work, args=(least,), daemon=True).start()

    def join(self, client: int, limit: int, deadline: float) -> None:
        """Add a client; the smallest limit of all of them holds, and the longest deadline.

        Raises:
            DataError: the present blocks of the others do not fit into its limit.
        """
        with self._changed:
            if limit < min(self._cache.present, self._cache.limit):
                raise DataError(too_small(self._cache.present, limit))
            self._limits[client] = (limit, deadline)
            self._apply_limit()

    def leave(self, client: int) -> None:
        """Forget a client and what it wants."""
        with self._changed:
            self._cache.leave(client)
            self._forget()
            if self._limits.pop(client, None):
                self._apply_limit()

    def want(self, client: int, present: list[Wanted], next: list[Wanted], ahead: list[Wanted]) -> None:
        """Replace what a client wants; raises DataError if its present block does not fit into the cache."""
        with self._changed:
            self._cache.hold(client, None)
            try:
                self._cache.want(client, present, next, ahead)
            finally:
                self._forget()
                self._changed.notify_all()

    def file(self, client: int, entry: Wanted, again: bool, waiting: Callable[[], None]) -> tuple[Path, bool]:
        """Wait until an object is in the cache; it stays there at least until the client's next request.

        Args:
            client: an earlier `join`.
            entry: need not be among what the client wants.
            again: compare the copy with its checksums again, for a reader that found wrong bytes.
            waiting: is called every second.

        Returns:
            Path of the copy, and whether it was there at once.

        Raises:
            DataError: it cannot be fetched, or finds no place.
        """
        with self._changed:
            size = sum(each.size for each in objects_of(entry))
            if size > self._cache.limit:
                raise DataError(too_small(size, self._cache.limit))
            self._cache.hold(client, entry)
            self._cache.retry(entry)
            start = self._failed
            path = self._cache.find(entry)
        if again and path is not None and not self._is_sound(entry, path, waiting):
            with self._changed:
                self._cache.drop(entry)
                path = None
        with self._changed:
            if entry.path not in self._asked:
                self._asked.add(entry.path)
                self._hits += path is not None
                self._misses += path is None
            self._changed.notify_all()
        hit, moved = path is not None, time.monotonic()
        while path is None:
            waiting()
            with self._changed:
                path = self._cache.find(entry)
                if path is None:
                    self._raise_failure(entry, start)
                    self._changed.wait(1.0)
                    path = self._cache.find(entry)
                if self._may_find_place(entry):
                    moved = time.monotonic()
                elif time.monotonic() - moved > self._patience and path is None:
                    raise DataError(self._no_place(entry))
        return path, hit

    def range(self, entry: Wanted, start: int, stop: int, deadline: float) -> bytes:
        """Bytes of an object, from its copy if there is one; nothing is added to the cache.

        Raises:
            DataError: it cannot be read within `deadline` seconds.
        """
        with self._changed:
            path = self._cache.find(entry)
        if path is not None:
            with suppress(OSError), path.open("rb") as file:  # it may have been evicted
                if len(data := os.pread(file.fileno(), stop - start, start)) == stop - start:
                    return data
        store = self._store(entry.set, deadline)
        return retried(lambda: store.read(entry.name, start, stop, entry.etag), deadline)[0]

    def stat(self, address: str, name: str, deadline: float) -> tuple[int, str | None]:
        """Size and ETag of an object; raises DataError if there is none, or no answer within `deadline` seconds."""
        store = self._store(address, deadline)
        blob = retried(lambda: store.stat(name), deadline)
        return blob.size, blob.etag

    def stats(self) -> dict[str, Any]:
        """Bytes fetched, seconds in which anything was fetched, hits, misses, evictions, bytes used, limit.

        An object is a hit if it was there when the first client asked for it; it counts again when nobody has wanted
        it in between.
        """
        with self._changed:
            seconds = self._seconds + (time.monotonic() - self._since if self._active else 0)
            return {
                "bytes": self._bytes,
                "seconds": seconds,
                "hits": self._hits,
                "misses": self._misses,
                "evictions": self._cache.evictions,
                "used": self._cache.used,
                "limit": self._cache.limit,
            }

    def _forget(self) -> None:
        self._asked = {path for path in self._asked if self._cache.is_wanted(path)}

    def _apply_limit(self) -> None:
        self._cache.set_limit(min((limit for limit, _ in self._limits.values()), default=self._limit))
        self._changed.notify_all()

    def _raise_failure(self, entry: Wanted, start: int) -> None:
        for each in objects_of(entry):
            number, sentence = self._failures.get(each.path, (0, ""))
            if number > start:
                raise DataError(sentence)

    def _may_find_place(self, entry: Wanted) -> bool:
        under_way = any(self._cache.is_fetching(each) for each in objects_of(entry))
        return under_way or (self._active > 0 and self._cache.present <= self._cache.limit)

    def _no_place(self, entry: Wanted) -> str:
        if self._cache.present > self._cache.limit:
            return too_small(self._cache.present, self._cache.limit)
        return f"{entry.name} finds no place in {self._cache.folder}, where files cannot be deleted; check its rights."

    def _work(self, least: int) -> None:
        """Fetch one object after the other, in a thread."""
        while True:
            with self._changed:
                while (entry := self._cache.next_fetch(least)) is None:
                    self._changed.wait()
                if not self._active:
                    self._since = time.monotonic()
                self._active += 1
                seconds = max((deadline for _, deadline in self._limits.values()), default=60.0)
            sentence = self._fetch(entry, seconds)
            with self._changed:
                self._active -= 1
                if not self._active:
                    self._seconds += time.monotonic() - self._since
                self._end(entry, sentence)
                self._changed.notify_all()

    def _end(self, entry: Wanted, sentence: str | None) -> None:
        """Note how a download ended: None if it is complete, an empty sentence if it was stopped."""
        if sentence is None:
            return self._cache.fetched(entry)
        if isinstance(entry.table, Wanted) and self._cache.find(entry.table) is None:
            sentence = ""  # somebody deleted the table under way: it is fetched again, and then the shard
        self._cache.not_fetched(entry, failed=bool(sentence))
        if sentence:
            self._failed += 1
            self._failures[entry.path] = (self._failed, sentence)
            print(sentence, file=sys.stderr, flush=True)

    def _fetch(self, entry: Wanted, seconds: float) -> str | None:
        """Download and check one object; return a sentence if that fails, an empty one if it was stopped."""
        path = self._cache.path(entry)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            download(
                self._store(entry.set, seconds),
                entry.name,
                path,
                size=entry.size,
                etag=entry.etag,
                deadline=seconds,
                check=lambda draft: check_copy(entry, draft, self._cache.folder),
                progress=self._progress,
                stopped=lambda: self._is_cancelled(entry),
            )
            return None
        except Stopped:
            return ""
        except Exception as error:  # of any library behind an address; the thread must live on
            if (reason := refusal(error)) and not isinstance(error, DataError):
                where = f"the copy of {entry.name} cannot be written to {self._cache.folder}: {reason}"
                return f"{where}; lower data.cache.gigabytes, or give another folder as data.cache.folder."
            if isinstance(error, UserError):
                return str(error)
            text = redact_text(f"{type(error).__name__}: {' '.join(str(error).split())}")
            return f"{entry.set}/{entry.name} cannot be fetched: {text}."
        finally:
            with suppress(OSError):
                path.with_name(path.name + ".part").unlink()

    def _progress(self, number: int) -> None:
        with self._changed:
            self._bytes += number

    def _is_cancelled(self, entry: Wanted) -> bool:
        with self._changed:
            return self._cache.is_cancelled(entry)

    def _is_sound(self, entry: Wanted, path: Path, waiting: Callable[[], None]) -> bool:
        if not entry.sha256 and entry.table is None:
            return False  # there is nothing to compare it with
        check = self._threads.submit(check_copy, entry, path, self._cache.folder)
        while not wait([check], 1.0).done:
            waiting()
        try:
            check.result()
        except (DataError, OSError):
            return False
        return True

    def _store(self, address: str, seconds: float) -> Store:
        with self._opening:
            store = self._stores.get(address)
            if store is None or (store.done() and store.exception() is not None):
                store = self._stores[address] = self._threads.submit(open_store, Url(address))
        if not wait([store], seconds).done:
            raise DataError(f"{address} cannot be opened: its driver has not answered for {seconds:g} s.")
        return store.result()
