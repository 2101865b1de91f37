"""A shard cache that each test has for itself."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mmlab.data.config import CacheConfig
from mmlab.data.remote import remote_files


@pytest.fixture
def cache(tmp_path) -> Iterator[CacheConfig]:
    """Settings of a cache in the test's folder; its fetcher is gone after the test."""
    cache = CacheConfig(folder=str(tmp_path / "cache"), gigabytes=1, deadline=60)
    yield cache
    for reader in remote_files._READERS.values():
        reader.client.close()
    remote_files._READERS.clear()
    kill_fetcher(cache)


def kill_fetcher(cache: CacheConfig) -> None:
    """Kill the fetcher of a cache, if it lives."""
    with suppress(OSError):
        process = int((cache.path / "lock").read_text().split()[1])
        if os.fsencode(cache.path) in Path(f"/proc/{process}/cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)


def used_bytes(cache: CacheConfig) -> int:
    """Bytes of all copies in a cache, unfinished ones too, while its fetcher writes and deletes them."""
    used = 0
    for path in cache.path.rglob("*-*.*"):
        with suppress(FileNotFoundError):
            used += path.stat().st_size
    return used
