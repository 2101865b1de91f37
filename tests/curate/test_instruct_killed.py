"""SIGKILL at every place where instruction data is written: nothing lost, nothing twice, nothing paid twice."""

import os
from pathlib import Path

import pytest

from mmlab.curate import instruct_pipeline, journal
from mmlab.curate.journal import read_rows
from mmlab.data.formats import RESPONSE_TYPES
from mmlab.data.index import ShardIndex
from mmlab.data.shards import ShardWriter
from tests.curate.killing import at_sync, deaths_of, die, in_a_process, torn, twice
from tests.curate.tiny_instruct import THINGS, endpoint, make_pictures, run

STEPS = ("answered", "parsed", "filtered")
FEW = THINGS[:3]  # nine questions: one reply is malformed, one is caught


@pytest.fixture
def server():
    with endpoint() as running:
        yield running


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ShardIndex:
    return make_pictures(tmp_path_factory.mktemp("killed") / "pictures", FEW)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory, index) -> Path:
    """The folder of a curation that nobody killed."""
    out = tmp_path_factory.mktemp("unharmed")
    with endpoint() as server:
        run(index, server, out, workers=1)
    return out


def assert_same(out: Path, unharmed: Path) -> None:
    for name in STEPS:
        rows, expected = (read_rows(folder / f"{name}.jsonl") for folder in (out, unharmed))
        assert len(rows) == len(expected)
        assert sorted(rows[1:], key=lambda row: row["key"]) == sorted(expected[1:], key=lambda row: row["key"])
    for path in [*(unharmed / "shards").glob("*.tar"), unharmed / "report.json", unharmed / instruct_pipeline.ENTRIES]:
        assert (out / path.relative_to(unharmed)).read_bytes() == path.read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in unharmed.iterdir()}, "no litter"


@pytest.mark.parametrize("number", [4, 7])
def test_killed_again_and_again(tmp_path, server, index, unharmed, number):
    deaths = deaths_of(lambda: run(index, server, tmp_path / "out", workers=1), at_sync(number))
    assert deaths >= 30 / number
    assert_same(tmp_path / "out", unharmed)
    assert len(server.paid) == len(FEW) * len(RESPONSE_TYPES) and twice(server) <= deaths


@pytest.mark.parametrize("row", [1, 4])
@pytest.mark.parametrize("step", STEPS)
def test_killed_within_a_row(tmp_path, server, index, unharmed, step, row):
    out = tmp_path / "out"
    assert not in_a_process(lambda: run(index, server, out, workers=1), torn(step, row))
    assert not (out / f"{step}.jsonl").read_bytes().endswith(b"\n"), "the line is torn"
    assert in_a_process(lambda: run(index, server, out, workers=1))
    assert_same(out, unharmed)
    assert twice(server) <= (step == "answered")


@pytest.mark.parametrize("where", ["write", "_finish"])
def test_killed_while_shards_are_written(tmp_path, server, index, unharmed, where):
    out = tmp_path / "out"
    assert not in_a_process(
        lambda: run(index, server, out, workers=1), lambda: setattr(ShardWriter, where, lambda *_: die())
    )
    assert list(out.glob("shards.tmp-*"))
    assert in_a_process(lambda: run(index, server, out, workers=1))
    assert_same(out, unharmed)


@pytest.mark.parametrize("name", [instruct_pipeline.ENTRIES, "report.json"])
def test_killed_while_a_file_is_written(tmp_path, server, index, unharmed, name):
    out = tmp_path / "out"

    def sabotage() -> None:
        sync = os.fsync

        def killing(fd: int) -> None:
            if os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).startswith(f".{name}."):
                die()
            sync(fd)

        journal.os.fsync = killing  # pyright: ignore[reportAttributeAccessIssue]

    assert not in_a_process(lambda: run(index, server, out, workers=1), sabotage)
    assert not (out / name).exists() and list(out.glob(f".{name}.*")), "a draft, and not the file"
    assert in_a_process(lambda: run(index, server, out, workers=1))
    assert_same(out, unharmed)
