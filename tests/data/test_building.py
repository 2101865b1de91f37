import hashlib
import json
from pathlib import Path

import pytest

from mmlab.config.errors import ConfigError, DataError, RunError
from mmlab.data.building import Build, Rows, versions_of, write_rows
from mmlab.data.sample_types import SampleError
from mmlab.data.tally import Tally
from mmlab.runs.disk import claim

SPLITS = {"val": 0.25, "test": 0.25}


class Numbers:
    """Rows 0 … count - 1: every fifth is left out where it is read, every seventh where it is converted.

    `stop` is a row at which the process is interrupted; `converted` has the rows that were converted.
    """

    def __init__(self, count: int, stop: int | None = None):
        self.count, self.stop, self.converted = count, stop, []

    def rows(self, **options) -> Rows:
        tally = Tally("even")

        def entries():
            for n in range(self.count):
                if n % 5 == 4:
                    tally.leave_out("fifth", f"row {n}")
                else:
                    yield f"row {n}", n

        return Rows(entries(), self.convert, tally, **options)

    def convert(self, where: str, n: int, tally: Tally):
        if n == self.stop:
            raise KeyboardInterrupt
        self.converted.append(n)
        with tally.row(where):
            if n % 7 == 6:
                raise SampleError("seventh", "It is a seventh.")
            tally.details["even"] += n % 2 == 0
            tally.note("tens", str(n // 10))
            # Rows 0 and 1, 2 and 3, … have the same image, and 10 and 20 the same name.
            return f"n{n % 10}", {"png": f"image {n // 2}".encode(), "json": {"n": n}}


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def numbers(index) -> list[int]:
    return [json.loads(index.read(i)["json"])["n"] for i in range(len(index))]


def test_splits_share_no_image_and_all_rows_add_up(tmp_path):
    build = Build(splits=SPLITS, max_samples=10)
    indexes, tally = write_rows(Numbers(400).rows(), tmp_path / "out", build, quiet=True)
    assert tally.counts() == {
        **{"rows": 400, "samples": 274, "fifth": 80, "seventh": 46},
        **{"even": 137, "tens": 40, "renamed": 266},
    }
    drawn = {name: set(numbers(index)) for name, index in indexes.items()}
    assert sum(map(len, drawn.values())) == 274
    pictures = {name: {n // 2 for n in drawn[name]} for name in drawn}
    assert not pictures["train"] & pictures["val"] and not pictures["val"] & pictures["test"]
    assert all(40 < len(drawn[name]) < 100 for name in SPLITS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    other, _ = write_rows(Numbers(400).rows(), tmp_path / "other", Build(splits=SPLITS, seed=1), quiet=True)
    assert set(numbers(other["val"])) != drawn["val"]
    fewer, _ = write_rows(Numbers(100).rows(), tmp_path / "fewer", Build(splits={"val": 0.25}), quiet=True)
    assert set(numbers(fewer["val"])) == {n for n in drawn["val"] if n < 100}, "an image stays in its split"


def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    for workers in (1, 3):
        build = Build(splits=SPLITS, max_samples=7, workers=workers)
        write_rows(Numbers(100).rows(), tmp_path / str(workers), build, quiet=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.parametrize(("splits", "streamed"), [({}, False), (SPLITS, False), (SPLITS, True)])
def test_a_stopped_build_continues_and_ends_with_the_same_bytes(tmp_path, splits, streamed):
    build = Build(splits=splits, max_samples=7, identity="numbers")
    _, counts = write_rows(Numbers(100).rows(), tmp_path / "whole", build, quiet=True)
    out = tmp_path / "out"
    versions = versions_of([Path(__file__)] * streamed)
    for stop in (30, 31, 75):
        with pytest.raises(KeyboardInterrupt):
            write_rows(Numbers(100, stop).rows(streamed=versions), out, build, quiet=True)
        assert not out.exists()
    rest = Numbers(100)
    _, tally = write_rows(rest.rows(streamed=versions), out, build, quiet=True)
    assert rest.converted[0] > 60
    assert contents(out) == contents(tmp_path / "whole") and tally.counts() == counts.counts()
    assert tally.lines() == counts.lines()


def test_another_build_starts_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_rows(Numbers(60, 50).rows(), tmp_path / "out", Build(max_samples=7, identity="a"), quiet=True)
    again = Numbers(60)
    write_rows(again.rows(), tmp_path / "out", Build(max_samples=7, identity="b"), quiet=True)
    assert again.converted[0] == 0
    for damage in ("state.json", "names"):
        with pytest.raises(KeyboardInterrupt):
            write_rows(Numbers(60, 50).rows(), tmp_path / "two", Build(7, True, identity="a"), quiet=True)
        (tmp_path / "two.building" / damage).write_bytes(b"")
        again = Numbers(60)
        write_rows(again.rows(), tmp_path / "two", Build(7, True, identity="a"), quiet=True)
        assert again.converted[0] == 0
        assert contents(tmp_path / "two") == contents(tmp_path / "out")


def test_changed_inputs_and_lost_shards_start_a_build_again(tmp_path):
    source, build = tmp_path / "source", Build(7, True, identity="a")
    draft = tmp_path / "out.building" / "train"
    cases = {
        "other rows": lambda: None,
        "other contents": lambda: source.write_text("longer"),
        "a lost shard": (draft / "shard-000002.tar").unlink,
    }
    for what, change in cases.items():
        source.touch()
        names = [source] if what == "other contents" else []
        with pytest.raises(KeyboardInterrupt):
            write_rows(Numbers(60, 50).rows(streamed=versions_of(names)), tmp_path / "out", build, quiet=True)
        change()
        again = Numbers(61 if what == "other rows" else 60)
        indexes, _ = write_rows(again.rows(streamed=versions_of(names)), tmp_path / "out", build, quiet=True)
        assert again.converted[0] == 0 and numbers(indexes["train"])[:3] == [0, 1, 2], what


def test_a_build_continues_when_the_disk_has_room_again(tmp_path):
    full, build = Numbers(60), Build(7, identity="a")

    def no_room(where: str, n: int, tally: Tally):
        if n == 50:
            raise OSError(28, "No space left on device")
        return Numbers.convert(full, where, n, tally)

    rows = full.rows()
    rows.convert = no_room
    with pytest.raises(RunError, match="the disk is full"):
        write_rows(rows, tmp_path / "out", build, quiet=True)
    again = Numbers(60)
    write_rows(again.rows(), tmp_path / "out", build, quiet=True)
    assert again.converted[0] >= 40


def test_a_limit_counts_rows_that_are_left_out(tmp_path):
    index, tally = write_rows(Numbers(400).rows(), tmp_path / "out", Build(limit=10), quiet=True)
    assert tally.rows == 10 and numbers(index["train"]) == [0, 1, 2, 3, 5, 7, 8]


def lost(where: str, n: int, tally: Tally):
    with tally.row(where):
        if n % 2:
            tally.lost.append(f"{where}: gone.")
            raise SampleError("missing", "gone")
        return str(n), {"json": {"n": n}}


def test_the_budget_of_lost_images(tmp_path):
    def rows(budget: float, **options) -> Rows:
        return Rows([(f"row {n}", n) for n in range(8)], lost, Tally(), budget, **options)

    _, tally = write_rows(rows(0.5), tmp_path / "out", quiet=True)
    assert tally.left_out == {"missing": 4}
    message = r"row 5: gone \(missing or unsupported: 3, the missing budget allows 2\)\."
    for workers in (1, 3):
        with pytest.raises(DataError, match=message):
            write_rows(rows(0.25), tmp_path / "two", Build(workers=workers), quiet=True)
    with pytest.raises(DataError, match="allows 2"):
        write_rows(rows(0.5, count=4), tmp_path / "two", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_built_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "split" / "val").mkdir(parents=True)
    (tmp_path / "split" / "val" / "thesis.tex").touch()
    cases = [
        (ConfigError, "the split 'train' is what the others leave", "x", {"splits": {"train": 0.5}}),
        (ConfigError, "leave nothing to 'train'", "x", {"splits": {"val": 0.5, "test": 0.5}}),
        (ConfigError, "at least one sample, not 0", "x", {"max_samples": 0}),
        (ConfigError, "file is a file", "file", {}),
        (ConfigError, "file is a file", "file", {"splits": SPLITS}),
        (ConfigError, "split/val is not empty", "split", {"splits": SPLITS}),
        (ConfigError, "'thesis.tex' in it is not part", "split", {"splits": SPLITS, "overwrite": True}),
        (
            DataError,
            r"train gets none of 7 samples.*the others smaller shares",
            "x",
            {"splits": {"val": 0.999}},
        ),
        (DataError, r"the split val=0\.001 gets none of 7 samples", "x", {"splits": {"val": 0.001}}),
    ]
    for error, message, name, options in cases:
        with pytest.raises(error, match=message):
            write_rows(Numbers(10).rows(), tmp_path / name, Build(**options), quiet=True)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.building").exists()
    lock = claim(tmp_path / "y.building" / "lock", "is busy in")
    lock.close()
    with pytest.raises(DataError, match="there are no samples to write"):
        write_rows(Numbers(0).rows(), tmp_path / "y", quiet=True)


def test_two_processes_do_not_build_one_set(tmp_path, monkeypatch):
    def held(path, doing):
        raise RunError(f"process 1 {doing} {path.parent}; wait for it, or stop it.")

    monkeypatch.setattr("mmlab.data.building.claim", held)
    with pytest.raises(RunError, match=r"is writing shards in .*out\.building; wait for it"):
        write_rows(Numbers(10).rows(), tmp_path / "out", quiet=True)


class Pairs(Numbers):
    """Rows of one or two pictures; 0 to 3, 4 to 7, … are connected, each row by a picture that it shares with the next.

    With `chain`, row 3 also has a picture of row 4, and so on.
    """

    def __init__(self, count: int, stop: int | None = None, chain: bool = False):
        super().__init__(count, stop)
        self.chain = chain

    def convert(self, where: str, n: int, tally: Tally):
        if n == self.stop:
            raise KeyboardInterrupt
        self.converted.append(n)
        with tally.row(where):
            last = n % 4 == 3 and not self.chain
            pictures = {"png": f"image {n}".encode()} | ({} if last else {"0.png": f"image {n + 1}".encode()})
            return f"n{n}", {**pictures, "json": {"n": n}}


def test_samples_that_share_pictures_are_in_one_split_and_a_build_of_them_continues(tmp_path):
    build = Build(splits=SPLITS, max_samples=7, identity="pairs")
    indexes, tally = write_rows(Pairs(80).rows(), tmp_path / "whole", build, quiet=True)
    drawn = {name: numbers(index) for name, index in indexes.items()}
    assert tally.written == sum(map(len, drawn.values())) == 64
    groups = {name: {n // 4 for n in drawn[name]} for name in drawn}
    split = {n: name for name, listed in drawn.items() for n in listed}
    # Row 4, 9, … is left out where it is read, and what it would connect is apart.
    assert all(split[n] == split[n + 1] for n in split if n % 4 != 3 and n + 1 in split)
    assert all(groups.values()) and all(listed == sorted(listed) for listed in drawn.values())
    out = tmp_path / "out"
    for stop in (30, 75):
        with pytest.raises(KeyboardInterrupt):
            write_rows(Pairs(80, stop).rows(), out, build, quiet=True)
    rest = Pairs(80)
    write_rows(rest.rows(), out, build, quiet=True)
    assert rest.converted[0] > 60 and contents(out) == contents(tmp_path / "whole")


def test_samples_that_share_no_picture_are_written_once(tmp_path, monkeypatch):
    apart = Pairs(80).rows()
    apart.entries = ((f"row {n}", n) for n in range(0, 80, 2))
    build = Build(splits=SPLITS, max_samples=7)
    monkeypatch.setattr("mmlab.data.building.NumberedTars", None)  # what writes them again
    indexes, _ = write_rows(apart, tmp_path / "out", build, quiet=True)
    assert sum(map(len, indexes.values())) == 40 and min(map(len, indexes.values())) > 0
    with pytest.raises(TypeError):
        write_rows(Pairs(80).rows(), tmp_path / "joined", build, quiet=True)


def test_a_build_that_is_killed_while_it_ends_continues(tmp_path, monkeypatch):
    build = Build(splits=SPLITS, max_samples=7, identity="pairs")
    write_rows(Pairs(80).rows(), tmp_path / "whole", build, quiet=True)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mmlab.data.building.put_in_place", stop)
        write_rows(Pairs(80).rows(), tmp_path / "out", build, quiet=True)
    write_rows(Pairs(80).rows(), tmp_path / "out", build, quiet=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_pictures_that_connect_all_samples_leave_no_split(tmp_path):
    rows = Pairs(9, chain=True).rows()
    rows.entries = ((f"row {n}", n) for n in range(9))
    with pytest.raises(DataError, match="gets none of 9 samples, of which 9 share pictures, also through each other"):
        write_rows(rows, tmp_path / "out", Build(splits=SPLITS), quiet=True)
