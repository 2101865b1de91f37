import json
import pickle
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmlab.config.errors import DataError
from mmlab.data.index import ShardIndex
from mmlab.data.indexing import build_index, index_set
from mmlab.data.sample_types import SampleError
from mmlab.data.shard_table import open_table
from tests.tiny_files import png, write_tar


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "set"
    record = json.dumps({"type": "why", "caption": "a red thing"}).encode()
    members = [(f"key{i}.{name}", data) for i in range(3) for name, data in (("png", png()), ("json", record))]
    write_tar(folder / "0.tar", *members, ("é.txt", b"x"), ("é.0.png", png()), ("é.1.png", png(5, 4)))
    build_index(folder, quiet=True)
    return folder


@pytest.fixture
def table(root) -> Path:
    return root / "index" / "0.safetensors"


def parts(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def put(path: Path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_all(root: Path) -> None:
    """Read what training reads of a set."""
    index = ShardIndex.open(root)
    for i in range(len(index)):
        _ = index.extensions(i), index.type_of(i), index.keys[i]
        try:
            index.read(i)
        except SampleError:
            continue
    for name in ("pictures", "image_sizes", "text_lengths"):
        index.joined(name)
    _ = index.find("key1"), index.of_type(0, "why"), list(index.keys)


def refused(root: Path, table: Path, match: str = "cannot be read") -> None:
    """Check that there is one sentence, that names the file and the command, and that memory is not used up."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match) as caught:
            read_all(root)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert str(table) in str(caught.value) and f"`mmlab shards index {root}`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_holds_what_was_written(root, table):
    opened = open_table(table, root)
    opened.check()
    assert opened.keys() == ["key0", "key1", "key2", "é"] and opened.find("é") == 3 and opened.find("x") is None
    assert [opened.type_of(j) for j in range(4)] == ["why", "why", "why", ""]
    assert opened.type_counts() == {"": 1, "why": 3} and opened.pictures.tolist() == [1, 1, 1, 2]
    assert opened.further_sizes.tolist() == [[5, 4]]
    data = (root / "0.tar").read_bytes()
    members = {name: data[offset : offset + length] for name, offset, length, _ in opened.members(3)}
    assert members == {"txt": b"x", "0.png": png(), "1.png": png(5, 4)}
    assert not opened.offset.flags.writeable and not opened.offset.flags.owndata  # mapped, not read


def test_a_table_that_is_no_file_of_arrays(root, table):
    whole = table.read_bytes()
    contents = [b"", b"PK\x03\x04 not a zip", pickle.dumps({"hash": 1}), b"\xff" * 200, whole + b"\0", whole[:-1]]
    for content in [*contents, *(whole[:size] for size in (5, 8, 20, 700, len(whole) - 20))]:
        table.write_bytes(content)
        refused(root, table)
    table.unlink()
    refused(root, table, "No such file")
    table.mkdir()
    refused(root, table, "directory")


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"3", b"\xff\xfe", b"null", b'{"x": NaN}'])
def test_a_header_that_is_something_else(root, table, text):
    put(table, text, parts(table)[1])
    refused(root, table)


SHAPES = [[1 << 60], [1 << 40, 1 << 40], [-1], [-2, -2], [4.0], ["4"], [True], [], [[4]], None, 4]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_that_does_not_fit(root, table, shape):
    for name in ("key_ends", "first", "further_sizes"):
        before = table.read_bytes()
        header, data = parts(table)
        header[name]["shape"] = shape
        put(table, header, data)
        refused(root, table)
        table.write_bytes(before)


def test_arrays_that_overlap_lack_or_are_of_another_type(root, table):
    header, data = parts(table)
    low, high = header["offset"]["data_offsets"]
    damages = [
        {"offset": {**header["offset"], "data_offsets": header["length"]["data_offsets"]}},  # twice the same bytes
        {"offset": {**header["offset"], "data_offsets": [low + 8, high + 8]}},
        {"offset": {**header["offset"], "data_offsets": [high, low]}},
        {"offset": {**header["offset"], "data_offsets": [1 << 60, (1 << 60) + high - low]}},
        {"offset": {**header["offset"], "data_offsets": [low]}},
        {"offset": {**header["offset"], "dtype": "U64"}},
        {"offset": {**header["offset"], "dtype": "object"}},
        {"offset": {}},
        {"offset": 3},
        {"more": header["offset"]},
        {"__metadata__": {}},
        {"__metadata__": {"about": "[]"}},
        {"__metadata__": {"about": "[" * 100_000}},
        {"__metadata__": "about"},
    ]
    for damage in damages:
        put(table, {**header, **damage}, data)
        refused(root, table)
    put(table, {name: value for name, value in header.items() if name != "crc"}, data)
    refused(root, table)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"version": [2]},
        {"size": "10240"},
        {"size": -1},
        {"size": 1 << 80, "etag": 3},
        {"etag": ["x"]},
        {"required": 3},
        {"type_names": [1, 2]},
        {"hash": None},
        {"notes": []},
        {"notes": {"skipped": {"x": "y"}}},
        {"notes": {"skipped": 3}},
        {"notes": {"examples": {"x": 3}}},
        {"notes": {"another": 3}},
        {"another": 3},
    ],
    ids=lambda change: json.dumps(change),
)
def test_statements_of_another_type(root, table, change):
    header, data = parts(table)
    about = {**json.loads(header["__metadata__"]["about"]), **change}
    put(table, {**header, "__metadata__": {"about": json.dumps(about)}}, data)
    refused(root, table)


VALUES = {
    "first": [[0, 1 << 55, 4, 6, 9], [0, 4, 2, 6, 9], [-1, 2, 4, 6, 9], [0, 2, 4, 6, 8], [0, 2, 4, 6, 1 << 62]],
    "extension": [[255] * 9],
    "offset": [[-1] * 9, [1 << 55] * 9, [-(1 << 63)] * 9],
    "length": [[-1] * 9, [1 << 55] * 9, [(1 << 63) - 1] * 9],
    "key_ends": [[-5, 8, 12, 14], [4, 2, 12, 14], [4, 8, 12, 1 << 60], [1 << 62, 8, 12, 14]],
    "key_bytes": [[255] * 14],
    "type_codes": [[255] * 4, [2] * 4],
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_lead_elsewhere(root, table, name):
    header, data = parts(table)
    low, high = header[name]["data_offsets"]
    dtype = load_file(table)[name].dtype
    for values in VALUES[name]:
        changed = np.array(values).astype(dtype).tobytes()
        assert len(changed) == high - low
        put(table, header, data[:low] + changed + data[high:])
        refused(root, table)
        with pytest.raises(DataError, match="cannot be read"):
            open_table(table, root).check()
    assert index_set(root, quiet=True).read == 1  # the damage is found, and the shard read again
    read_all(root)


def test_damage_of_any_byte_is_one_error_or_none(root, table):
    whole, chance = table.read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        table.write_bytes(bytes(data))
        try:
            read_all(root)
        except DataError as error:
            assert str(error).count("\n") == 0 and len(str(error)) < 600


def test_long_names_do_not_make_a_table_unreadable(tmp_path):
    record = json.dumps({"caption": 3}).encode()
    long = [(f"{'k' * 3000}{i}.json", b"{broken") for i in range(50)]
    write_tar(tmp_path / "0.tar", *long, *((f"a.{'x' * 5000}{i}", record) for i in range(50)), ("b.txt", b"x"))
    index = build_index(tmp_path, quiet=True)
    assert index.notes.bad_records == 50 and index.notes.skipped["." + "x" * 199] == 50
    assert len(index) == 51 and ShardIndex.open(tmp_path).keys[50] == "b"
