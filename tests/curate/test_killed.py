"""SIGKILL at every place where a curation writes: each row once, each reply billed once."""

import os
import signal
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from mmlab.curate import journal
from mmlab.curate.client import Client
from mmlab.curate.journal import read_rows
from mmlab.curate.llava_instruct_pipeline import ENTRIES
from mmlab.data.index import ShardIndex
from mmlab.data.shard_files import ShardWriter
from tests.curate import tiny_curation, tiny_instruct
from tests.curate.killing import at_sync, deaths_of, die, in_a_process, torn, twice
from tests.curate.scripted_endpoint import ScriptedEndpoint


class Work(NamedTuple):
    """A pipeline, its images, and the folder of a curation that was not killed."""

    pipeline: ModuleType
    index: ShardIndex
    unharmed: Path

    def run(self, server: ScriptedEndpoint, out: Path, workers: int = 1) -> None:
        self.pipeline.run(self.index, server, out, llm={"workers": workers})

    def assert_same(self, out: Path) -> None:
        for name in self.pipeline.STEPS:
            rows, expected = (read_rows(folder / f"{name}.jsonl") for folder in (out, self.unharmed))
            assert len(rows) == len(expected), name
            assert sorted(rows[1:], key=lambda row: row["key"]) == sorted(expected[1:], key=lambda row: row["key"])
        for path in [*self.unharmed.glob("shards/*.tar"), *self.unharmed.glob("*.json")]:
            assert (out / path.relative_to(self.unharmed)).read_bytes() == path.read_bytes()
        for folder in (".", "shards"):
            assert sorted(os.listdir(out / folder)) == sorted(os.listdir(self.unharmed / folder)), "no litter"


def work_of(pipeline: ModuleType, folder: Path) -> Work:
    work = Work(pipeline, pipeline.few_images(folder / "images"), folder / "unharmed")
    with pipeline.endpoint() as server:
        work.run(server, work.unharmed)
    assert len(read_rows(work.unharmed / f"{pipeline.STEPS[0]}.jsonl")) == pipeline.ROWS + 1, "and the settings"
    return work


# LLaVA's last step, which is not resumed but repeated, syncs more than three times.
SYNCS = [*((tiny_curation, number) for number in (2, 3, 4, 7, 12)), *((tiny_instruct, number) for number in (4, 7))]
PIPELINES = (tiny_curation, tiny_instruct)
ROWS = [(pipeline, step, row) for pipeline in PIPELINES for step in pipeline.STEPS for row in (1, 2, 5)]
FILES = [(tiny_curation, "report.json"), (tiny_instruct, "report.json"), (tiny_instruct, ENTRIES)]


def name_of(value: Any) -> str | None:
    return value.__name__.rpartition("_")[2] if isinstance(value, ModuleType) else None


@pytest.fixture(scope="module")
def work(request, tmp_path_factory) -> Work:
    return work_of(request.param, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def minigpt4(tmp_path_factory) -> Work:
    return work_of(tiny_curation, tmp_path_factory.mktemp("minigpt4"))


@pytest.fixture
def server(request):
    pipeline = request.getfixturevalue("work").pipeline if "work" in request.fixturenames else tiny_curation
    with pipeline.endpoint() as running:
        yield running


@pytest.mark.parametrize(("work", "number"), SYNCS, indirect=["work"], ids=name_of)
def test_killed_again_and_again(tmp_path, server, work, number):
    deaths = deaths_of(lambda: work.run(server, tmp_path / "out"), at_sync(number))
    assert deaths >= 30 / number
    work.assert_same(tmp_path / "out")
    assert len(server.paid) == work.pipeline.PROMPTS and twice(server) <= deaths


@pytest.mark.parametrize(("work", "step", "row"), ROWS, indirect=["work"], ids=name_of)
def test_killed_within_a_row(tmp_path, server, work, step, row):
    out = tmp_path / "out"
    assert not in_a_process(lambda: work.run(server, out), torn(step, row))
    assert not (out / f"{step}.jsonl").read_bytes().endswith(b"\n"), "the line is torn"
    assert in_a_process(lambda: work.run(server, out))
    work.assert_same(out)
    assert len(server.paid) == work.pipeline.PROMPTS and twice(server) <= (step in ("repaired", "answered"))


@pytest.mark.parametrize("where", ["write", "_finish", "rename", "remove"])
@pytest.mark.parametrize("work", PIPELINES, indirect=True, ids=name_of)
def test_killed_while_shards_are_written(tmp_path, server, work, where):
    out = tmp_path / "out"
    if where in ("rename", "remove"):
        assert in_a_process(lambda: work.run(server, out)), "the next command replaces shards"

    def sabotage() -> None:
        if where == "rename":
            rename = Path.rename

            def killing(self, target):
                done = rename(self, target)
                if ".old-" in str(target):
                    die()
                return done

            Path.rename = killing
        elif where == "remove":
            import mmlab.data.shard_files as shards

            shards.shutil.rmtree = lambda *_, **__: die()
        else:
            setattr(ShardWriter, where, lambda *_: die())

    assert not in_a_process(lambda: work.run(server, out), sabotage)
    assert list(out.glob("shards.tmp-*")) or where in ("rename", "remove")
    assert in_a_process(lambda: work.run(server, out))
    work.assert_same(out)


@pytest.mark.parametrize(("work", "name"), FILES, indirect=["work"], ids=name_of)
def test_killed_while_a_file_is_written(tmp_path, server, work, name):
    out = tmp_path / "out"

    def sabotage() -> None:
        sync = os.fsync

        def killing(fd: int) -> None:
            if os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).endswith(f"-{name}"):
                die()
            sync(fd)

        journal.os.fsync = killing  # pyright: ignore[reportAttributeAccessIssue]

    assert not in_a_process(lambda: work.run(server, out), sabotage)
    assert not (out / name).exists() and list(out.glob(f".draft-*-{name}")), "a draft, and not the file"
    assert in_a_process(lambda: work.run(server, out))
    work.assert_same(out)


def test_killed_while_requests_are_in_flight(tmp_path, minigpt4):
    """Two requests have replies, two hang: none is answered, and billed, twice."""
    hangs, out = True, tmp_path / "out"

    def script(prompt: str, attempt: int) -> str:
        return "hang" if hangs and ("cat" in prompt or "lamp" in prompt) else "ok"

    with ScriptedEndpoint(script, answer=tiny_curation.answer) as server:
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(60)
                minigpt4.run(server, out, workers=5)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        end = time.monotonic() + 60
        while len(list((out / "replies").glob("*/[!.]*"))) < 3 or len(server.asked) < 5:
            assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < end
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        hangs = False
        assert in_a_process(lambda: minigpt4.run(server, out, workers=5))
        server.released.set()
        minigpt4.assert_same(out)
        assert len(server.asked) == 7 and len(set(server.asked)) == 5


def test_killed_before_a_reply_is_stored(tmp_path, server, minigpt4):
    """The only moment that costs: that reply alone is requested again."""
    out = tmp_path / "out"

    def sabotage() -> None:
        request = Client._request

        def killing(self, name, question, stop):
            if "lamp" in question["messages"][-1]["content"]:
                self.backend.complete(question["messages"], stop)
                die()
            return request(self, name, question, stop)

        Client._request = killing

    assert not in_a_process(lambda: minigpt4.run(server, out), sabotage)
    assert in_a_process(lambda: minigpt4.run(server, out))
    minigpt4.assert_same(out)
    assert sorted(server.paid.values()) == [1, 1, 1, 1, 2]


def test_two_processes_at_once_are_refused(tmp_path, server, minigpt4):
    lock = journal.claim(tmp_path / "out" / ".lock", "curates into")

    def second() -> None:
        with pytest.raises(Exception, match=r"process \d+ on \S+ curates into .*out; wait for it, or stop it\."):
            minigpt4.run(server, tmp_path / "out")

    assert in_a_process(second)
    lock.close()
    minigpt4.run(server, tmp_path / "out")
