"""The process, its queue and its clients, against a server on loopback."""

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmlab.config.errors import DataError, RunError
from mmlab.data.remote import fetch_queue, fetcher
from mmlab.data.remote.fetch_client import FetchClient
from mmlab.data.remote.shard_cache import ShardCache
from mmlab.data.remote.wanted import Wanted
from tests.tiny_servers import RangeServer, etag_of
from tests.tiny_shards import make_shards

SIZE = 20_000


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RangeServer]:
    folder = tmp_path_factory.mktemp("bucket")
    for i in range(200):
        (folder / f"{i}.bin").write_bytes(bytes([i]) * SIZE)
    with RangeServer(folder, stall=1.0) as server:
        yield server


@pytest.fixture
def shards(server) -> list[Wanted]:
    server.planned.clear()
    server.sent.clear()
    return [wanted(server, f"{i}.bin") for i in range(200)]


def wanted(server: RangeServer, name: str) -> Wanted:
    file = server.folder / name
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Wanted(server.address, name, file.stat().st_size, etag_of(file), sha256=digest)


@pytest.fixture
def connect(tmp_path) -> Iterator[Callable[..., FetchClient]]:
    """Makes clients of one cache folder; its fetcher is gone after the test."""
    folder = tmp_path / "cache"
    clients: list[FetchClient] = []

    def make(shards: int = 10, deadline: float = 60.0, **settings: Any) -> FetchClient:
        clients.append(
            FetchClient(**{"folder": folder, "limit": shards * SIZE, "deadline": deadline, "idle": 2.0} | settings)
        )
        return clients[-1]

    yield make
    for client in clients:
        client.close()
        if process := process_of(client.folder):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def process_of(folder: Path) -> int | None:
    """The fetcher of a folder, if it lives."""
    with suppress(OSError):
        process = int((folder / "lock").read_text().split()[1])
        words = Path(f"/proc/{process}/cmdline").read_bytes()
        return process if os.fsencode(folder) in words else None
    return None


def wait_until(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def files(client: FetchClient) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in client.folder.rglob("*.bin"))


def test_fetches_ahead_and_answers_with_whole_files(connect, shards):
    client = connect()
    client.want(shards[:2], shards[2:4], shards[4:5])
    assert [client.file(each).read_bytes()[:1] for each in shards[:2]] == [b"\0", b"\1"]
    wait_until(lambda: client.stats()["used"] == 5 * SIZE and files(client) == list("01234"))
    client.file(shards[4])
    stats = client.stats()
    assert stats["bytes"] == 5 * SIZE and stats["hits"] + stats["misses"] == 3 and stats["hits"] >= 1
    assert 0 < stats["seconds"] < 60 and stats["limit"] == 10 * SIZE


def test_clients_share_one_download(connect, shards, server):
    clients = [connect() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda client: client.file(shards[0]), clients))
    assert len(set(paths)) == 1 and server.sent["0.bin"] == [(0, SIZE)]


def test_a_killed_fetcher_is_replaced_while_clients_wait(connect, shards, server):
    clients = [connect() for _ in range(2)]
    for client in clients:
        client.want(shards[:1], shards[1:2])
    clients[0].file(shards[0])
    for _ in range(3):
        first = clients[0].stats()["process"]
        server.planned.extend(["stall"] * 8)
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(client.file, each) for client, each in zip(clients, shards[2:4], strict=True)]
            wait_until(lambda: len(server.planned) < 8)
            os.kill(first, signal.SIGKILL)
            server.planned.clear()
            assert [answer.result().read_bytes()[:1] for answer in answers] == [b"\2", b"\3"]
        for path in (answer.result() for answer in answers):
            path.unlink()
        assert clients[1].stats()["process"] != first
    os.kill(clients[1].stats()["process"], signal.SIGKILL)
    for path in clients[0].folder.rglob("*.bin"):
        path.unlink()
    clients[0].stats()
    wait_until(lambda: files(clients[0]) == ["0", "1"])  # the new fetcher knows what is wanted


def test_the_limit_holds_while_clients_move_through_many_shards(connect, shards):
    most = 14
    clients = [connect(most) for _ in range(3)]
    wrong: list[str] = []
    moving = threading.Event()

    def move(client: FetchClient, start: int) -> None:
        for i in range(start, start + 60):
            client.want(shards[i : i + 2], shards[i + 2 : i + 4], shards[i + 4 : i + 6])
            if client.file(shards[i]).read_bytes() != bytes([i]) * SIZE:
                wrong.append(shards[i].name)

    def sizes(folder: Path) -> dict[str, int]:
        found = {}
        for path in folder.rglob("*.bin*"):
            with suppress(OSError):
                found[path.name.removesuffix(".part")] = path.stat().st_size
        return found

    def watch() -> None:
        while not moving.is_set():
            before = sizes(clients[0].folder)
            after = sizes(clients[0].folder)  # what both have was all there in between
            if sum(min(size, after.get(name, 0)) for name, size in before.items()) > most * SIZE:
                wrong.append("too many bytes")

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(move, clients, (0, 60, 120)))
    moving.set()
    watcher.join()
    stats = clients[0].stats()
    assert not wrong and stats["used"] <= most * SIZE and stats["evictions"] > 100


def test_ends_when_nobody_is_connected(connect, shards):
    client = connect(idle=0.3)
    client.file(shards[0])
    process = client.stats()["process"]
    time.sleep(1)
    assert client.stats()["process"] == process
    client.close()
    wait_until(lambda: process_of(client.folder) is None)
    assert not (client.folder / "socket").exists()
    assert client.file(shards[0]) and client.stats()["hits"] == 1  # another took the file over


def test_ignores_the_signals_that_end_a_job(connect):
    client = connect()
    process = client.stats()["process"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(process, number)
    assert client.stats()["process"] == process


def test_eight_that_start_at_the_same_time_get_one_fetcher(connect):
    client = connect()
    code = (
        "import sys; from pathlib import Path; from mmlab.data.remote.fetch_client import FetchClient\n"
        "client = FetchClient(Path(sys.argv[1]), 1000, 60, 2.0)\n"
        "print(client.stats()['process'], flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(client.folder)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    answers = {process.stdout.readline() for process in started if process.stdout}
    for process in started:
        process.communicate("")
    assert answers == {f"{client.stats()['process']}\n"}


def test_a_forked_process_connects_anew(connect, shards):
    client = connect()
    client.want(shards[:1])
    client.file(shards[0])
    descriptor = client._wire.socket.fileno()
    code = os.fork()
    if code == 0:
        with suppress(BaseException):
            assert client._wire is None and client._wants is None
            with suppress(OSError):
                os.fstat(descriptor)
                os._exit(1)
            assert client.file(shards[1]).read_bytes()[:1] == b"\1"
            os._exit(0)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(code, 0)[1]) == 0
    assert client._wire.socket.fileno() == descriptor
    assert client.file(shards[2]).read_bytes()[:1] == b"\2"


def test_present_blocks_of_several_clients_that_never_fit_are_an_error_and_no_hang(connect, shards, tmp_path):
    command = [sys.executable, "-m", "mmlab.data.remote.fetcher", str(tmp_path / "cache"), "--limit", "1"]
    subprocess.run([*command, "--patience", "1", "--idle", "10"], check=True)
    first, second = connect(3), connect(3)
    with pytest.raises(DataError, match=r"take 8e-05 GB, but the shard cache holds 6e-05 GB; raise data\.cache\.gig"):
        first.want(shards[:4])
    first.want(shards[:2])
    for each in shards[:2]:
        first.file(each)
    second.want(shards[2:4])
    paths, errors = [], []
    for each in shards[2:4]:
        try:
            paths.append(second.file(each))
        except DataError as error:
            errors.append(str(error))
    assert len(paths) == 1 and "take 8e-05 GB" in errors[0]
    first.close()  # as if it was killed
    assert all(second.file(each) for each in shards[2:4])
    with pytest.raises(DataError, match="take 4e-05 GB, but the shard cache holds 2e-05 GB"):
        connect(1).stats()  # it would take the place of running readers
    assert connect(2).stats()["limit"] == 2 * SIZE


def test_errors_reach_all_that_wait_and_the_next_request_tries_again(connect, shards, server):
    missing = replace(shards[0], name="late.bin")
    clients = [connect() for _ in range(2)]
    for client in clients:
        with pytest.raises(DataError, match=rf"there is no {server.address}/late\.bin"):
            client.file(missing)
    (server.folder / "late.bin").write_bytes(bytes(SIZE))
    assert clients[0].file(missing).read_bytes() == bytes(SIZE)
    (server.folder / "late.bin").unlink()
    damaged = replace(shards[5], sha256="0" * 64)
    with pytest.raises(DataError, match=r"5\.bin .*wrong content in two downloads.* shards index --again"):
        clients[0].file(damaged)


def test_reads_ranges_without_a_copy_and_checks_a_copy_again(connect, shards, server):
    client = connect()
    server.planned.extend(["503", "cut"])
    assert client.range(shards[7], 3, 9) == bytes([7]) * 6 and files(client) == []
    assert client.read(server.address, "8.bin") == bytes([8]) * SIZE
    assert client.stat(server.address, "8.bin") == (SIZE, shards[8].etag)
    path = client.file(shards[9])
    path.write_bytes(bytes(SIZE))
    assert client.file(shards[9]).read_bytes() == bytes(SIZE)  # of the right size
    assert client.range(shards[9], 0, 2) == b"\0\0"
    assert client.file(shards[9], again=True).read_bytes() == bytes([9]) * SIZE


def test_clients_hear_that_a_copy_is_checked_again(tmp_path, monkeypatch):
    entry, told = Wanted("x://set", "0.tar", 1, sha256="0"), threading.Event()
    (tmp_path / entry.path).parent.mkdir()
    (tmp_path / entry.path).write_bytes(b"0")
    monkeypatch.setattr(fetch_queue, "check_copy", lambda *args: told.wait(30))
    queue = fetch_queue.FetchQueue(ShardCache(tmp_path, 100))
    assert queue.file(1, entry, True, told.set)[1] and told.is_set()


def test_other_credentials_need_another_folder(connect, monkeypatch):
    first = connect()
    process = first.stats()["process"]
    monkeypatch.setenv("AWS_BATCH_JOB_ID", "7")
    first.close()
    assert first.stats()["process"] == process  # another job of the same user
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "secret-id")
    second = connect()
    with pytest.raises(DataError, match=r"other credentials .* use it; give another folder as data\.cache\.folder"):
        second.stats()
    first.close()
    wait_until(lambda: succeeds(second))  # nobody else uses it: a new fetcher
    assert second.stats()["process"] != process
    assert "secret-id" not in (first.folder / "fetcher.log").read_text()


def succeeds(client: FetchClient) -> bool:
    with suppress(DataError):
        return bool(client.stats())
    return False


def test_a_fetcher_that_hangs_is_an_error(connect):
    client = connect()
    process = client.stats()["process"]
    os.kill(process, signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    client._wire.socket.settimeout(0.2)
    with pytest.raises(RunError, match=rf"\(process {process} on .*\) has not answered for 60 s; end that process"):
        client.stats()
    os.kill(process, signal.SIGKILL)
    assert client.stats()["process"] != process


def test_a_driver_that_hangs_is_an_error(monkeypatch):
    monkeypatch.setattr(fetcher, "_GRACE", 0.0)
    ended, wire = threading.Event(), SimpleNamespace(send=lambda message: None)
    with pytest.raises(DataError, match=r"x://set/0\.tar cannot be read: its driver has not answered for 0\.1 s"):
        fetcher._while_waiting(lambda _: ended.wait(), 0.1, wire, "x://set/0.tar")  # type: ignore[arg-type]
    ended.set()


def test_a_store_that_opens_slowly_holds_nobody_else(tmp_path, monkeypatch):
    opening, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(fetch_queue, "open_store", lambda url: (opening.set(), ended.wait()))
    queue = fetch_queue.FetchQueue(ShardCache(tmp_path, 100))
    with ThreadPoolExecutor(2) as pool:
        stat = pool.submit(queue.stat, "x://set", "0.tar", 1.0)
        opening.wait()
        try:
            assert pool.submit(queue.stats).result(timeout=60)["used"] == 0
        finally:
            ended.set()
        assert stat.exception() is not None


def test_a_store_that_never_opens_is_an_error(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(fetch_queue, "open_store", lambda url: ended.wait())
    queue = fetch_queue.FetchQueue(ShardCache(tmp_path, 100))
    queue.join(1, 100, 0.1)
    with ThreadPoolExecutor(1) as pool:
        file = pool.submit(queue.file, 1, Wanted("x://set", "0.tar", 1), False, lambda: None)
        try:
            with pytest.raises(DataError, match=r"x://set cannot be opened: its driver has not answered for 0\.1 s"):
                file.result(timeout=30)
        finally:
            ended.set()


def test_a_cache_folder_of_another_machine_is_an_error(connect):
    client = connect()
    client.folder.mkdir()
    with (client.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 1 on node-7")
        lock.flush()
        with pytest.raises(RunError, match=r"is used by node-7; give each machine one .* \$MMLAB_SHARD_CACHE"):
            client.stats()


def test_a_full_disk_is_an_error_that_names_the_settings(connect, shards, tmp_path):
    command = [sys.executable, "-m", "mmlab.data.remote.fetcher", str(tmp_path / "cache"), "--limit", "1"]
    shell = ["bash", "-c", 'ulimit -f 10; exec "$@"', "-"]  # blocks of 1024 bytes
    subprocess.run([*shell, *command], check=True)
    client = connect()
    with pytest.raises(DataError, match=r"the copy of 0\.bin cannot be written .*; lower data\.cache\.gigabytes, or"):
        client.file(shards[0])
    assert client.stats()["used"] == 0


def test_folders_of_long_names_and_folders_that_cannot_be_made(connect, shards, tmp_path):
    deep = connect(folder=tmp_path / ("long" * 20) / ("long" * 20))
    assert deep.file(shards[0]).exists()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"the fetcher of .*/file/cache cannot start: "):
        connect(folder=tmp_path / "file" / "cache").stats()


def test_a_deleted_cache_folder_is_made_again(connect, shards):
    client, other = connect(), connect()
    process = client.stats()["process"]
    subprocess.run(["rm", "-r", str(client.folder)], check=True)
    assert other.file(shards[0]).exists()
    wait_until(lambda: client.stats()["process"] != process)
    assert client.file(shards[1]).exists() and client.folder == other.folder


def test_members_of_a_shard_are_compared_with_its_table(connect, server):
    index = make_shards(server.folder / "set", 8, per_shard=8)
    entry = index.manifest.entries[0]
    address = f"{server.address}/set"
    table = Wanted(address, f"index/{entry.table_name}", entry.table_bytes, sha256=entry.table)
    shard = Wanted(address, entry.name, entry.bytes, hash=entry.hash, table=table)
    client = connect()
    file = server.folder / "set" / entry.name
    right = file.read_bytes()
    assert client.file(shard).read_bytes() == right and client.file(table).stat().st_size == entry.table_bytes

    wrong = right.replace(b"number 5", b"number 6")
    client.file(shard).write_bytes(wrong)
    assert client.file(shard, again=True).read_bytes() == right
    client.file(shard).unlink()
    client.file(table).unlink()
    file.write_bytes(wrong)
    with pytest.raises(DataError, match=rf"{entry.name} has wrong content in two downloads: .* other bytes at \d+"):
        client.file(shard)
    assert len(server.sent[f"set/{entry.name}"]) == 4
    local = replace(shard, table=str(server.folder / "set" / "index" / entry.table_name))
    file.write_bytes(right)
    assert client.file(local).read_bytes() == right
