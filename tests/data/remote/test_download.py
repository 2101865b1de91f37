"""The download of one object: no wrong byte, no byte twice after a cut, and an end in time."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmlab.config.errors import DataError, RunError
from mmlab.config.locations import Url
from mmlab.data.remote import download as download_module
from mmlab.data.remote.download import Stopped, download, read_object, retried
from mmlab.data.remote.store import Blob, DriverStore, open_store
from mmlab.data.remote.store_errors import ChangedError, StoreFault
from tests.tiny_servers import FAULTS, RangeServer, etag_of, s3_environment, s3_server

SIZE = 1_000_003
RANGE = 32 << 10


@pytest.fixture
def server(tmp_path) -> Iterator[RangeServer]:
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    (tmp_path / "served" / "bucket" / "0.tar").write_bytes(os.urandom(SIZE))
    with RangeServer(tmp_path / "served", stall=0.02) as server:
        yield server


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(download_module, "RANGE", RANGE)
    monkeypatch.setattr(download_module, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(download_module, "LONGEST_WAIT", 0.01)


@pytest.fixture
def target(tmp_path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "0.tar"


def served(server: RangeServer, name: str = "0.tar") -> bytes:
    return (server.folder / "bucket" / name).read_bytes()


def checksum(data: bytes) -> Callable[[Path], None]:
    def check(path: Path) -> None:
        if hashlib.sha256(path.read_bytes()).digest() != hashlib.sha256(data).digest():
            raise DataError("its checksum is another than the index says.")

    return check


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_hundreds_of_faults_and_no_wrong_byte(server, target, scheme):
    names = [f"{i}.tar" for i in range(12)]
    for name in names:
        (server.folder / "bucket" / name).write_bytes(os.urandom(SIZE))
    server.rate, received, kinds = 0.5, [], Path(target.parent)
    with s3_environment(server.address):
        store = open_store(Url(f"{server.address}/bucket" if scheme == "http" else "s3://bucket"))
        for name in names:
            check, etag = checksum(served(server, name)), etag_of(server.folder / "bucket" / name)
            download(store, name, kinds / name, size=SIZE, etag=etag, check=check, progress=received.append)
    assert all((kinds / name).read_bytes() == served(server, name) for name in names)
    assert sorted(path.name for path in kinds.iterdir()) == sorted(names)
    assert sum(server.faults.values()) > 300 and set(server.faults) == set(FAULTS)
    assert sum(received) >= len(names) * SIZE


class Wavering(DriverStore):
    """Answers with too few bytes, too many, and as many as were asked for, in turn, without an error."""

    def get(self, name: str, start: int, stop: int, etag: str | None = None) -> tuple[Blob, Iterator[bytes]]:
        self.count = getattr(self, "count", -1) + 1
        end = (max(start, stop - 9), stop + 9, stop)[self.count % 3]
        blob, _ = super().get(name, start, stop, etag)
        return blob, iter([(self._files.cat_file(self._path(name)) + bytes(9))[start:end]])


def test_an_answer_that_is_too_short_or_too_long(server, target):
    store = Wavering(Url("memory://wavering"))
    store.write("0.tar", served(server))
    target.with_name("0.tar.part").write_bytes(bytes(2 * SIZE))  # of a process that was killed
    received = []
    download(store, "0.tar", target, progress=received.append)
    assert target.read_bytes() == served(server) and sum(received) == SIZE
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("connections", [1, 4])
def test_each_byte_is_sent_once_though_answers_are_cut(server, target, connections, monkeypatch):
    monkeypatch.setattr(download_module, "CONNECTIONS", connections)
    received = []
    server.rate, server.kinds = 0.6, ("cut", "stall", "503", "429")
    blob = download(open_store(Url(f"{server.address}/bucket")), "0.tar", target, progress=received.append)
    assert target.read_bytes() == served(server) and (blob.name, blob.size) == ("0.tar", SIZE)
    assert server.faults["cut"] and server.faults["stall"]
    parts = sorted(part for part in server.sent["bucket/0.tar"] if part[0] < part[1])
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])] and parts[-1][1] == SIZE
    assert sum(received) == SIZE


def test_stores_of_other_kinds(server, target, tmp_path):
    memory = open_store(Url("memory://downloads"))
    memory.write("0.tar", served(server))
    memory.write("empty.tar", b"")
    assert download(memory, "0.tar", target).etag is None and target.read_bytes() == served(server)
    download(memory, "empty.tar", target)  # replaces what is there
    assert target.read_bytes() == b""
    with s3_server():
        store = open_store(Url("s3://bucket/set"))
        blob = store.write("0.tar", server.folder / "bucket" / "0.tar")
        assert download(store, "0.tar", target, size=blob.size, etag=blob.etag) == blob
    assert target.read_bytes() == served(server)


def test_an_object_that_differs_from_its_index(server, target):
    store, etag = open_store(Url(f"{server.address}/bucket")), etag_of(server.folder / "bucket" / "0.tar")
    for size, other in ((SIZE - 1, etag), (SIZE, '"other"'), (SIZE + 9, None), (None, '"other"')):
        with pytest.raises(ChangedError, match=r"0\.tar has changed since it was indexed; run mmlab"):
            download(store, "0.tar", target, size=size, etag=other)
    with pytest.raises(DataError, match=r"there is no .*bucket/1\.tar"):
        download(store, "1.tar", target)
    assert list(target.parent.iterdir()) == []


def test_an_object_that_is_replaced_meanwhile(server, target):
    def replace(count: int) -> None:
        (server.folder / "bucket" / "0.tar").write_bytes(bytes(SIZE))

    with pytest.raises(ChangedError, match="has changed"):
        download(open_store(Url(f"{server.address}/bucket")), "0.tar", target, progress=replace)
    assert list(target.parent.iterdir()) == []


def test_wrong_content_is_fetched_once_more(server, target):
    store, check = open_store(Url(f"{server.address}/bucket")), checksum(served(server))
    server.planned.extend(["", "flip"])
    download(store, "0.tar", target, check=check)
    assert target.read_bytes() == served(server) and server.faults["flip"] == 1
    target.write_bytes(b"earlier")
    (server.folder / "bucket" / "0.tar").write_bytes(bytes(SIZE))
    server.sent.clear()
    with pytest.raises(DataError, match="wrong content in two downloads: its checksum is another than the index says;"):
        download(store, "0.tar", target, check=check)
    assert sum(stop - start for start, stop in server.sent["bucket/0.tar"]) == 2 * SIZE
    assert target.read_bytes() == b"earlier" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("fault", ["503", "stall"])
def test_a_deadline_ends_a_download(server, target, fault):
    server.rate, server.kinds, server.stall = 1.0, (fault,), 30
    store, start = open_store(Url(f"{server.address}/bucket")), time.monotonic()
    about: Any = {"size": SIZE, "etag": etag_of(server.folder / "bucket" / "0.tar")}
    last = "503 Service Unavailable" if fault == "503" else "the store is slow or hangs"
    with pytest.raises(DataError, match=rf"not complete after 1 s: \d+ of {SIZE} bytes came, .*{last}"):
        download(store, "0.tar", target, **about, deadline=1)
    assert time.monotonic() - start < 25  # a stalled answer does not hold it
    assert list(target.parent.iterdir()) == []


def test_a_download_is_stopped(server, target):
    server.rate, server.kinds, server.stall = 1.0, ("stall",), 30
    received = []
    with pytest.raises(Stopped):
        download(
            open_store(Url(f"{server.address}/bucket")),
            "0.tar",
            target,
            progress=received.append,
            stopped=lambda: bool(received),
        )
    assert list(target.parent.iterdir()) == []


def test_a_full_disk_is_final(server, target, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match=r"0\.tar\.part cannot be written: the disk is full"):
        download(open_store(Url(f"{server.address}/bucket")), "0.tar", target)
    assert list(target.parent.iterdir()) == []


def test_a_kill_leaves_a_part_that_the_next_download_replaces(server, target):
    code = (
        "import sys; from pathlib import Path; from mmlab.config.locations import Url\n"
        "from mmlab.data.remote.download import download; from mmlab.data.remote.store import open_store\n"
        "store, path = open_store(Url(sys.argv[1])), Path(sys.argv[2])\n"
        "download(store, '0.tar', path, progress=lambda count: print(count, flush=True))"
    )
    server.rate, server.kinds, server.stall = 1.0, ("stall",), 30
    command = [sys.executable, "-c", code, f"{server.address}/bucket", str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in target.parent.iterdir()] == ["0.tar.part"]
    server.rate = 0.0
    download(open_store(Url(f"{server.address}/bucket")), "0.tar", target)
    assert target.read_bytes() == served(server) and list(target.parent.iterdir()) == [target]


def test_small_objects_are_read_whole_after_faults(server):
    server.planned.extend(["503", "cut", "reset"])
    store = open_store(Url(f"{server.address}/bucket"))
    data, blob = read_object(store, "0.tar")
    assert data == served(server) and blob == store.stat("0.tar") and sum(server.faults.values()) == 3


def test_calls_are_repeated_until_a_deadline():
    calls = []

    def fails() -> None:
        calls.append(1)
        raise StoreFault("the store cannot be reached: the connection was refused.")

    with pytest.raises(DataError, match=r"refused, in \d+ attempts within 0\.3 s") as error:
        retried(fails, deadline=0.3)
    assert len(calls) > 1 and not isinstance(error.value, StoreFault)
