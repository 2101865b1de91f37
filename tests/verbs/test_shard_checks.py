"""`mmlab shards verify`, `stats` and `show` on large and on remote sets."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mmlab.data.index import ShardIndex
from mmlab.data.remote import remote_files
from mmlab.verbs import _shard_checks
from mmlab.verbs._shard_samples import find_key
from mmlab.verbs.shards import main
from tests.tiny_servers import RangeServer, s3_environment

SHARDS = 12  # of 10 samples


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[Path]:
    """A folder that the server shows as `s3://bucket`, with a set that was indexed there."""
    folder = tmp_path_factory.mktemp("server")
    build = ["build", "shapes", "--count", str(10 * SHARDS), "--size", "32", "--shard-samples", "10"]
    assert main([*build, str(folder / "bucket" / "set")]) == 0
    with RangeServer(folder) as server, s3_environment(server.address), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMLAB_SHARD_CACHE", str(folder / "cache"))
        yield folder / "bucket"
        for reader in remote_files._READERS.values():  # then the fetcher ends
            reader.client.close()
        remote_files._READERS.clear()


@pytest.fixture
def served(bucket, tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    return "s3://bucket/set"


def run(capsys, *command: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main([str(word) for word in command]) == code
    printed = capsys.readouterr()
    assert not code or (printed.out == "" and printed.err.count("\n") == 1)
    return printed.err if code else printed.out


def statistics(capsys, *command: object) -> dict:
    return json.loads(run(capsys, "stats", *command, "--json"))


def test_statistics_of_a_large_set_are_estimated(bucket, capsys, monkeypatch):
    whole = statistics(capsys, bucket / "set")
    assert whole["shards_read"] == SHARDS and whole["estimated"] == []
    monkeypatch.setattr(_shard_checks, "STATS_SAMPLES", 100)
    monkeypatch.setattr(_shard_checks, "STATS_SHARDS", 4)
    some = statistics(capsys, bucket / "set")
    assert some["shards_read"] == 4 and some["seed"] == 0
    exact = {"samples", "shards", "bytes", "samples_per_shard", "types", "question_types", "hash"}
    assert exact.isdisjoint(some["estimated"]) and all(some[name] == whole[name] for name in exact)
    # Each sample has one image and one record, so these estimates are right.
    assert some["members"] == whole["members"] == {"png": 10 * SHARDS, "json": 10 * SHARDS}
    assert some["pictures"] == 10 * SHARDS and {"members", "pictures", "width"} <= {*some["estimated"]}
    assert statistics(capsys, bucket / "set", "--all") == whole
    assert statistics(capsys, bucket / "set", "--shards", 5)["shards_read"] == 5
    table = run(capsys, "stats", bucket / "set", "--seed", 3)
    assert re.search(r"\npictures +~ 120\n", table) and re.search(r"\nsamples +120\n", table)
    assert "~ is estimated from 4 of 12 shards (--seed 3)" in table
    assert "estimated" not in run(capsys, "stats", bucket / "set", "--all")


def test_totals_are_scaled_by_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(capsys, "build", "shapes", "set", "--count", 25, "--size", 32, "--shard-samples", 10)
    for seed in range(3):  # the last shard has 5 samples
        assert statistics(capsys, "set", "--shards", 2, "--seed", seed)["members"] == {"png": 25, "json": 25}


def test_a_draw_of_local_shards_is_verified(bucket, capsys):
    assert "120 samples in 12 shards, all" in run(capsys, "verify", bucket / "set")
    first, second = run(capsys, "verify", bucket / "set", "--shards", 3).splitlines()
    assert "30 of 120 samples in 3 of 12 shards" in first and "the other shards were not read" in second
    seed = re.search(r"--seed (\d+)", second)
    assert seed and run(capsys, "verify", bucket / "set", "--shards", 3, "--seed", seed[1]).splitlines()[1] == second
    assert "not allowed with" in run(capsys, "verify", bucket / "set", "--shards", 3, "--all", code=2)


def test_remote_sets_are_checked_from_a_few_shards(served, bucket, capsys, monkeypatch):
    monkeypatch.setattr(_shard_checks, "STATS_SHARDS", 4)
    monkeypatch.setattr(_shard_checks, "VERIFIED_SHARDS", 2)
    local = statistics(capsys, bucket / "set")
    remote = statistics(capsys, served)
    assert remote["shards_read"] == 4 and remote["pictures"] == local["pictures"] == 120
    assert statistics(capsys, served, "--all") == {**local, "root": served}
    assert "20 of 120 samples in 2 of 12 shards" in run(capsys, "verify", served)
    assert "120 samples in 12 shards, all" in run(capsys, "verify", served, "--all")
    assert "sheet.png: 16 of 120 samples of s3://bucket/set" in run(capsys, "show", served, "--out", "sheet.png")
    assert Image.open("sheet.png").width > 500


def test_a_key_is_searched_in_the_tables_of_a_remote_set(served, bucket, capsys):
    index = ShardIndex.open(served)
    assert find_key(index, "train-0000055") == 55 and index.keys[55] == "train-0000055"
    assert find_key(index, "train-000055") is None
    megabytes = sum(path.stat().st_size for path in (bucket / "set" / "index").glob("*.safetensors")) / 1e6
    assert f"'train-000055' is searched in the tables of 12 shards ({megabytes:.1f} MB)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [("flip", r"shard-000007\.tar"), ("grow", r"shard-000007\.tar has \d+ bytes, but had \d+"), ("add", "was added")],
)
def test_changes_of_a_remote_set_are_found(served, bucket, capsys, change, message):
    names = {"flip": "shard-000007.tar", "grow": "shard-000007.tar", "add": "extra.tar"}
    path = bucket / "set" / names[change]
    before = path.read_bytes() if path.exists() else None
    data = bytearray(before or b"x")
    if change == "flip":
        index = ShardIndex.open(bucket / "set")
        data[index.table(7).members(2)[0][1]] ^= 1
    else:
        data += bytes(512)
    try:
        path.write_bytes(data)
        error = run(capsys, "verify", served, "--all", code=1)
        assert re.search(message, error) and "s3://bucket/set" in error
    finally:
        path.unlink() if before is None else path.write_bytes(before)
