import json
import random
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from mmlab.config.errors import DataError
from mmlab.data.index import ShardIndex
from mmlab.data.indexing import build_index
from mmlab.data.manifest import Manifest
from tests.tiny_files import write_tar


@pytest.fixture
def root(tmp_path) -> Path:
    for i in range(3):
        write_tar(tmp_path / "set" / f"{i}.tar", (f"k{i}.json", b'{"type": "why"}'), (f"k{i}.url", b"x"))
    build_index(tmp_path / "set", ["json"], quiet=True)
    return tmp_path / "set"


@pytest.fixture
def file(root) -> Path:
    return root / "index" / "manifest.json"


def refused(root: Path, file: Path) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="cannot be read") as caught:
            ShardIndex.open(root)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert str(file) in str(caught.value) and f"rebuild it with `mmlab shards index {root}`" in str(caught.value)


def test_a_manifest_is_what_was_written(file):
    manifest = Manifest.of(file.read_bytes())
    assert Manifest.of(manifest.to_json()) == manifest and manifest.required == ("json",)
    assert manifest.samples.tolist() == [1, 1, 1] and manifest.type_names == ("why",)
    assert manifest.notes.skipped == {".url": 3}
    assert len(file.read_text().splitlines()) == 5  # a line for each shard


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b"null", b"{}", b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b'{"version": 2}', b'"x'],
)
def test_something_else_is_refused(root, file, content):
    file.write_bytes(content)
    refused(root, file)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"hash": "0"},
        {"notes": 3},
        {"required": None},
        {"shards": {}},
        {"shards": []},
        {"shards": [3]},
    ],
    ids=lambda change: json.dumps(change),
)
def test_other_statements_are_refused(root, file, change):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(root, file)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../0.tar"},
        {"name": "/etc/0.tar"},
        {"name": ".0.tar"},
        {"name": "0.tar\0"},
        {"name": "passwd"},
        {"name": "1.tar"},
        {"name": "9.tar"},
        {"name": 3},
        {"bytes": -1},
        {"bytes": "3"},
        {"bytes": 1 << 70},
        {"samples": 1 << 70},
        {"samples": 1 << 62},
        {"samples": -1},
        {"samples": 1.5},
        {"samples": True},
        {"samples": 10**400},
        {"hash": 3},
        {"table": ["x"]},
        {"table_bytes": None},
        {"etag": 3},
        {"types": [1]},
        {"types": {"x": "y"}},
        {"another": 3},
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_a_shard_with_values_that_no_shard_has(root, file, change):
    content = json.loads(file.read_text())
    content["shards"][0] |= change
    # With a hash that fits, so that it alone does not tell.
    with suppress(KeyError, TypeError):
        content["hash"] = Manifest.__dict__["hash"].func(_Entries(content["shards"]))
    file.write_text(json.dumps(content))
    refused(root, file)


class _Entries:
    """Stands for a manifest whose hash is computed, whatever its entries are."""

    def __init__(self, shards: list[dict]):
        self.entries = [type("Entry", (), shard)() for shard in shards]


def test_damage_of_any_byte_is_one_error_or_none(root, file):
    whole, chance = file.read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        data[chance.randrange(len(data))] = chance.randrange(256)
        file.write_bytes(bytes(data))
        try:
            ShardIndex.open(root)
        except DataError as error:
            assert str(error).count("\n") == 0 and len(str(error)) < 600
