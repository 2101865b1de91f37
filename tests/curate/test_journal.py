"""Rows that survive a kill, and steps that resume with the same settings."""

import os
import re
import subprocess
import sys

import pytest

from mmlab.config.errors import ConfigError, DataError, RunError
from mmlab.curate import journal
from mmlab.curate.journal import Journal, Steps, claim, open_journal, read_rows, step_rows
from mmlab.runs.disk import write_text

ROWS = [{"key": "a", "text": "one\ntwo"}, {"key": "b", "text": "“ü”"}]


def test_rows_are_read_back(tmp_path):
    first = Journal(tmp_path / "x" / "rows.jsonl")
    for row in ROWS:
        first.append(row)
    assert first.rows == ROWS == read_rows(first.path) == Journal(first.path).rows


@pytest.mark.parametrize("torn", [b"{", b'{"key": "c", "te', b'{"key": "c"}', b"\0\0\0\n", b"[1]\n"])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    Journal(path).append(ROWS[0])
    path.write_bytes(path.read_bytes() + torn)
    assert read_rows(path) == ROWS[:1] and path.read_bytes().endswith(torn), "reading changes nothing"
    again = Journal(path)
    assert again.rows == ROWS[:1]
    again.append(ROWS[1])
    assert read_rows(path) == ROWS and path.read_bytes().count(b"\n") == 2


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"key": "a"}\n{"key": \n{"key": "c"}\n')
    with pytest.raises(DataError, match="line 2, is damaged"):
        Journal(path)


def test_a_full_disk_keeps_earlier_rows(tmp_path, monkeypatch):
    rows = Journal(tmp_path / "rows.jsonl")
    rows.append(ROWS[0])
    write = os.write

    def half(fd, data):
        if len(data) > 8:
            return write(fd, data[:8])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "write", half)
    with pytest.raises(RunError, match="the disk is full"):
        rows.append({"key": "c", "t": ""})
    monkeypatch.undo()
    rows.append(ROWS[1])
    assert read_rows(rows.path) == ROWS == rows.rows


def test_a_file_is_complete_or_unchanged(tmp_path, monkeypatch):
    write_text(tmp_path / "f" / "x.json", "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "fsync", full)
    with pytest.raises(RunError, match="the disk is full"):
        write_text(tmp_path / "f" / "x.json", "new")
    assert [path.read_text() for path in (tmp_path / "f").iterdir()] == ["old"]


def test_a_lock_has_one_owner(tmp_path):
    held = claim(tmp_path / ".lock", "curates into")
    code = f"from mmlab.curate.journal import claim, Path; claim(Path({str(tmp_path / '.lock')!r}), 'curates into')"

    def other():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr

    assert re.search(rf"process {os.getpid()} on \S+ curates into {tmp_path}; wait for it, or stop it\.", other())
    held.close()
    assert other() == ""


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="out is a file; give a folder as out=…"):
        claim(tmp_path / "out" / ".lock", "curates into")


LONG = "Fix the error in the given paragraph. Remove any repeating sentences, meaningless characters, and so on."


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ("a", "b", "written with repair=a, not b; use another out"),
        (LONG + " Be brief.", LONG + " Be kind.", "repair=… and so on. Be brief., not … and so on. Be kind.;"),
        (LONG, LONG[:-1], "repair=…ters, and so on., not …ters, and so on;"),
        (LONG, "Mend.", "repair=Fix the error in the given paragraph. Remove any repeating s…, not Mend.;"),
        ({"max_tokens": 9, "top_p": 1.0}, {"max_tokens": 12, "top_p": 1.0}, "with repair.max_tokens=9, not 12;"),
        ({"seed": 5}, {}, "written with repair.seed=5, not null;"),
        ({"extra": {"a": 1}}, {"extra": {"a": 1, "b": [2]}}, "written with repair.extra.b=null, not [2];"),
        (["empty"] * 9 + ["repeats"], ["empty"] * 9 + ["symbols"], '"repeats"], not …'),
    ],
)
def test_differing_settings_are_shown(tmp_path, before, now, says):
    for _ in range(2):
        open_journal(tmp_path, "repaired", {"data": "x", "repair": before})
    with pytest.raises(ConfigError) as caught:
        Steps(tmp_path, [], {"data": "x"}, quiet=True).run("repaired", lambda rows: rows, repair=now)
    message = str(caught.value)
    assert says in message and len(message) < 320 + len(str(tmp_path))


def test_a_block_is_computed_as_a_whole_and_existing_rows_stay(tmp_path):
    """A model's answers depend on the rest of their batch, so a resumed process computes the same batches."""
    seen: list[str] = []

    def step(some):
        seen.append("".join(row["key"] for row in some))
        yield from ({**row, "beside": len(some)} for row in some)

    journal = open_journal(tmp_path, "one", {})
    for key in "abc":
        journal.append({"key": key, "beside": 2})
    journal.close()
    rows = Steps(tmp_path, [{"key": key} for key in "abcde"], {}, quiet=True).run("one", step, block=2)
    assert seen == ["cd", "e"] and [row["beside"] for row in rows] == [2, 2, 2, 2, 1]
    assert step_rows(tmp_path, "one") == rows, "nothing twice"


def test_a_row_with_a_fault_goes_no_further(tmp_path):
    steps = Steps(tmp_path, [{"key": "a"}, {"key": "b"}], {}, quiet=True)
    rows = steps.run("one", lambda rows: ({**row, **({"fault": "?"} if row["key"] == "a" else {})} for row in rows))
    assert rows == [{"key": "a", "fault": "?"}, {"key": "b"}]
    assert steps.run("two", lambda rows: rows) == [{"key": "b"}]
