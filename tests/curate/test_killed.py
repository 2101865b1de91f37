"""SIGKILL at every place where a curation writes: nothing lost, nothing twice, nothing paid twice."""

import os
import signal
import time
import traceback
from pathlib import Path

import pytest

from mmlab.curate import journal
from mmlab.curate.client import Client
from mmlab.curate.steps import STEPS, read_rows
from mmlab.data.index import ShardIndex
from mmlab.data.shards import ShardWriter
from tests.curate.killing import at_sync, deaths_of, die, in_a_process, torn, twice
from tests.curate.scripted_endpoint import ScriptedEndpoint
from tests.curate.tiny_curation import SAID, answer, make_pictures, run


@pytest.fixture
def server():
    with ScriptedEndpoint(answer=answer) as running:
        yield running


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    return make_pictures(tmp_path_factory.mktemp("killed") / "pictures")


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory, index) -> Path:
    """The folder of a curation that nobody killed."""
    out = tmp_path_factory.mktemp("unharmed")
    with ScriptedEndpoint(answer=answer) as server:
        run(index, server, out, workers=1)
    return out


def assert_same(out: Path, unharmed: Path) -> None:
    for name in STEPS:
        rows, expected = (read_rows(folder / f"{name}.jsonl") for folder in (out, unharmed))
        assert len(rows) == len(SAID) + 1, f"{name}: a row per sample and the settings"
        assert sorted(rows[1:], key=lambda row: row["key"]) == sorted(expected[1:], key=lambda row: row["key"])
    assert sorted(os.listdir(out / "shards")) == sorted(os.listdir(unharmed / "shards")), "no litter"
    for tar in (unharmed / "shards").glob("*.tar"):
        assert (out / "shards" / tar.name).read_bytes() == tar.read_bytes()
    assert (out / "report.json").read_text() == (unharmed / "report.json").read_text()
    assert {path.name for path in out.iterdir()} == {path.name for path in unharmed.iterdir()}


@pytest.mark.parametrize("number", [2, 3, 4, 7, 12])
def test_killed_again_and_again(tmp_path, server, index, unharmed, number):
    deaths = deaths_of(lambda: run(index, server, tmp_path / "out", workers=1), at_sync(number))
    assert deaths >= 30 / number
    assert_same(tmp_path / "out", unharmed)
    assert len(server.paid) == 5 and twice(server) <= deaths


@pytest.mark.parametrize("row", [1, 2, 5])
@pytest.mark.parametrize("step", STEPS)
def test_killed_within_a_row(tmp_path, server, index, unharmed, step, row):
    out = tmp_path / "out"
    assert not in_a_process(lambda: run(index, server, out, workers=1), torn(step, row))
    assert not (out / f"{step}.jsonl").read_bytes().endswith(b"\n"), "the line is torn"
    assert in_a_process(lambda: run(index, server, out, workers=1))
    assert_same(out, unharmed)
    assert len(server.paid) == 5 and twice(server) <= (step == "repaired")


def test_killed_while_questions_are_on_their_way(tmp_path, index, unharmed):
    """Two are answered, two hang: none of them is answered, and paid for, twice."""
    hangs, out = True, tmp_path / "out"

    def script(prompt: str, attempt: int) -> str:
        return "hang" if hangs and ("cat" in prompt or "lamp" in prompt) else "ok"

    with ScriptedEndpoint(script, answer=answer) as server:
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(60)
                run(index, server, out, workers=5)
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
        assert in_a_process(lambda: run(index, server, out, workers=5))
        server.released.set()
        assert_same(out, unharmed)
        assert len(server.asked) == 7 and len(set(server.asked)) == 5


def test_killed_with_a_reply_in_the_hand(tmp_path, server, index, unharmed):
    """The one moment that costs: it came, and was not written. It alone is asked for again."""
    out = tmp_path / "out"

    def sabotage() -> None:
        ask = Client._ask

        def killing(self, name, question, stop):
            if "lamp" in question["messages"][-1]["content"]:
                self.backend.complete(question["messages"], stop)
                die()
            return ask(self, name, question, stop)

        Client._ask = killing

    assert not in_a_process(lambda: run(index, server, out, workers=1), sabotage)
    assert in_a_process(lambda: run(index, server, out, workers=1))
    assert_same(out, unharmed)
    assert sorted(server.paid.values()) == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("where", ["write", "_finish", "rename", "remove"])
def test_killed_while_shards_are_written(tmp_path, server, index, unharmed, where):
    out = tmp_path / "out"
    assert in_a_process(lambda: run(index, server, out, workers=1)), "the next command replaces shards"

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
            import mmlab.data.shards as shards

            shards.shutil.rmtree = lambda *_, **__: die()
        else:
            setattr(ShardWriter, where, lambda *_: die())

    assert not in_a_process(lambda: run(index, server, out, workers=1), sabotage)
    assert in_a_process(lambda: run(index, server, out, workers=1))
    assert_same(out, unharmed)


def test_two_at_once_are_refused(tmp_path, server, index):
    held = journal.claim(tmp_path / "out" / ".lock", "curates into")

    def second() -> None:
        with pytest.raises(Exception, match=r"process \d+ curates into .*out; wait for it, or stop it\."):
            run(index, server, tmp_path / "out")

    assert in_a_process(second)
    held.close()
    run(index, server, tmp_path / "out")
