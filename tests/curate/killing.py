"""SIGKILL at chosen places of a curation, in a child process."""

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable

from mmlab.curate import journal
from mmlab.curate.client import Client
from tests.curate.scripted_endpoint import ScriptedEndpoint

Kill = Callable[[], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_process(work: Callable[[], object], sabotage: Kill = lambda: None) -> bool:
    """Do the work in a child process; returns False if it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            sabotage()
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, f"ended with {status}"
    return not killed


def deaths_of(work: Callable[[], object], sabotage: Kill) -> int:
    """How often `work` is killed, each time resumed in another child process, before it is done."""
    deaths = 0
    while not in_a_process(work, sabotage):
        deaths += 1
        assert deaths < 100
    return deaths


def twice(server: ScriptedEndpoint) -> int:
    """Replies beyond the first to each prompt. A kill costs at most the one request that is then in flight."""
    return sum(server.paid.values()) - len(server.paid)


def at_sync(number: int) -> Kill:
    """Die at the `number`th fsync, before it happens.

    Drafts do not count, and requests in flight are awaited: other tests are about their cost.
    """

    def sabotage() -> None:
        sync, request = os.fsync, Client._request
        count, asking, dying = 0, set(), threading.Event()

        def killing(fd: int) -> None:
            nonlocal count
            path = os.readlink(f"/proc/self/fd/{fd}")
            draft = os.path.basename(path).startswith(".") or ".tmp-" in path
            count += not draft
            if count == number and not draft:
                dying.set()
                while asking - {threading.get_ident()}:
                    time.sleep(0.001)
                die()
            sync(fd)

        def watched(self, name, question, stop):
            asking.add(threading.get_ident())
            if dying.is_set():
                asking.discard(threading.get_ident())
                time.sleep(60)
            try:
                return request(self, name, question, stop)
            finally:
                asking.discard(threading.get_ident())

        journal.os.fsync = killing  # pyright: ignore[reportAttributeAccessIssue]
        Client._request = watched

    return sabotage


def torn(step: str, row: int) -> Kill:
    """Die in the middle of writing a row."""

    def sabotage() -> None:
        write, count = os.write, 0

        def killing(fd: int, data: bytes) -> int:
            nonlocal count
            if os.readlink(f"/proc/self/fd/{fd}").endswith(f"{step}.jsonl"):
                count += 1
                if count == row:
                    write(fd, data[: len(data) // 2])
                    die()
            return write(fd, data)

        journal.os.write = killing  # pyright: ignore[reportAttributeAccessIssue]

    return sabotage
