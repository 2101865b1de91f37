"""Rows that survive whatever ends the process."""

import os
import subprocess
import sys

import pytest

from mmlab.config.errors import ConfigError, DataError, RunError
from mmlab.curate import journal
from mmlab.curate.journal import Journal, claim, read_rows, write_whole

ROWS = [{"key": "a", "text": "one\ntwo"}, {"key": "b", "text": "“ü”"}]


def test_rows_come_back(tmp_path):
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


def test_a_full_disk_loses_no_earlier_row(tmp_path, monkeypatch):
    rows = Journal(tmp_path / "rows.jsonl")
    rows.append(ROWS[0])
    write = os.write

    def half(fd, data):
        if len(data) > 8:
            return write(fd, data[:8])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "write", half)
    with pytest.raises(RunError, match="No space left"):
        rows.append({"key": "c", "t": ""})
    monkeypatch.undo()
    rows.append(ROWS[1])
    assert read_rows(rows.path) == ROWS == rows.rows


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "f" / "x.json", "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_whole(tmp_path / "f" / "x.json", "new")
    assert [path.read_text() for path in (tmp_path / "f").iterdir()] == ["old"]


def test_one_process_at_a_time(tmp_path):
    held = claim(tmp_path / ".lock", "curates into")
    code = f"from mmlab.curate.journal import claim, Path; claim(Path({str(tmp_path / '.lock')!r}), 'curates into')"

    def other():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr

    assert f"process {os.getpid()} curates into {tmp_path}; wait for it, or stop it." in other()
    held.close()
    assert other() == ""


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="out is a file; give a folder as out=…"):
        claim(tmp_path / "out" / ".lock", "curates into")
