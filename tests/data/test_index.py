import io
import json
import multiprocessing
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlab.config.errors import DataError, RunError
from mmlab.data import index_arrays
from mmlab.data.formats import EXTENSIONS, MOST_PICTURES, picture_members, pictures_among
from mmlab.data.images import load_rgb
from mmlab.data.index import ShardIndex
from mmlab.data.indexing import build_index
from mmlab.data.sample_types import SampleError
from mmlab.data.shard_files import stats
from mmlab.runs.index_files import INDEX_NAME
from tests.tiny_files import bomb, png, write_tar
from tests.tiny_shapes import make_records


def sample(key: str, caption: str = "a red thing") -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png()), (f"{key}.json", json.dumps({"caption": caption}).encode())]


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "set"
    write_tar(folder / "00001.tar", *sample("c", "three"))
    write_tar(folder / "00000.tar", *sample("dir.x/a"), *sample("b", "two"))
    return folder


def test_index_holds_positions_sizes_and_keys(root):
    index = build_index(root)
    assert len(index) == 3
    assert index.shards == ("00000.tar", "00001.tar")
    assert index.samples_per_shard.tolist() == [2, 1] and index.samples_per_shard.dtype == np.int64
    assert list(index.keys) == ["dir.x/a", "b", "c"]
    assert index.image_sizes.tolist() == [[8, 6]] * 3 and index.image_sizes.dtype == np.int32
    assert index.text_lengths.tolist() == [11, 3, 5] and index.text_lengths.dtype == np.int32
    assert index.read(1) == {"png": png(), "json": b'{"caption": "two"}'}
    assert list(index.read(2, only=["json"])) == ["json"]
    with pytest.raises(IndexError):
        index.read(3)


def test_open_returns_what_build_returned(root):
    built, opened = build_index(root), ShardIndex.open(root)
    assert opened.hash == built.hash and list(opened.keys) == list(built.keys)
    assert [opened.read(i) for i in range(3)] == [built.read(i) for i in range(3)]
    assert [path.name for path in root.iterdir() if "tmp" in path.name] == []


def test_types_are_known_without_reading(tmp_path):
    records = [b'{"type": "why"}', b"{}", b'{"type": 3}', b'{"type": "talk"}', b"broken", b'{"type": "why"}']
    long = json.dumps({"type": "x" * 65}).encode()
    write_tar(tmp_path / "0.tar", *((f"s{i}.json", record) for i, record in enumerate([*records, long])))
    index = build_index(tmp_path)
    expected = ["why", "", "", "talk", "", "why", ""]
    assert [index.type_of(i) for i in range(7)] == expected
    assert [ShardIndex.open(tmp_path).type_of(i) for i in range(7)] == expected


def test_types_of_questions_are_counted(tmp_path):
    typed = [{"question": "q", "answer": "a", "type": kind} for kind in ("color", "count", "color")]
    records = [{"questions": typed}, {"questions": [*typed[:1], {"question": "q", "answer": "a"}]}, {"caption": "c"}]
    index = make_records(tmp_path / "set", records, [None] * 3)
    assert index.notes.question_types == {"color": 3, "count": 1}
    assert stats(index)["question_types"] == {"color": 3, "count": 1}
    plain = make_records(tmp_path / "plain", records[2:], [None])
    assert plain.notes.question_types == {} and "question_types" not in plain.notes.as_json()


def test_a_different_type_for_each_sample_is_ignored(tmp_path):
    write_tar(tmp_path / "0.tar", *((f"s{i}.json", json.dumps({"type": f"t{i}"}).encode()) for i in range(300)))
    assert build_index(tmp_path).type_names == ("",)


def test_hash_depends_only_on_the_contents(root, tmp_path):
    first = build_index(root).hash
    root.rename(tmp_path / "moved")
    assert build_index(tmp_path / "moved").hash == first
    write_tar(tmp_path / "moved" / "00001.tar", *sample("c", "THREE"))
    assert build_index(tmp_path / "moved").hash != first


def test_processes_read_in_parallel(root):
    assert build_index(root, workers=2, quiet=True).hash == build_index(root).hash


def test_side_files_of_img2dataset_are_ignored(root):
    (root / "00000.parquet").write_bytes(b"PAR1")
    (root / "00000_stats.json").write_text("{}")
    null = ("x.json", b'{"caption": null}')
    write_tar(root / "00002.tar", ("x.jpg", b"\xff\xd8\xff"), ("x.txt", "grün".encode()), null)
    index = build_index(root)
    assert len(index) == 4
    assert index.text_lengths[3] == 4  # the caption of the text file, as the JSON has none
    assert index.image_sizes[3].tolist() == [0, 0]  # unreadable: the reader's to replace


def test_a_bomb_is_recorded_not_fatal(tmp_path):
    write_tar(tmp_path / "0.tar", ("x.jpg", bomb()))
    assert build_index(tmp_path).image_sizes.tolist() == [[30000, 30000]]


def turned(orientation: int, kind: str = "JPEG", late: bool = False) -> bytes:
    """An image of 8 × 6 pixels with an EXIF orientation; `late`: after the pixels of a PNG."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 6)).save(file, kind, exif=exif)
    data = file.getvalue()
    if late:
        start = data.index(b"eXIf") - 4
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        data = data[:start] + data[stop:-12] + data[start:stop] + data[-12:]
    return data


def test_sizes_of_all_pictures_are_those_that_are_decoded(tmp_path):
    pictures = {
        "a": {"jpg": turned(6), "0.png": png(5, 4), "1.jpg": b"junk", "2.webp": turned(8, "WEBP")},
        "b": {"json": b"{}"},
        "c": {"1.png": turned(3, "PNG"), "0.png": turned(5, "PNG", late=True), "png": turned(7, "PNG")},
        "d": {"png": png(3, 2), "jpg": turned(2), "0.jpg": turned(6), "0.jpeg": png()},
        "e": {"0.png": png(9, 1)},
    }
    write_tar(
        tmp_path / "0.tar", *((f"{key}.{name}", data) for key, one in pictures.items() for name, data in one.items())
    )
    for index in (build_index(tmp_path), ShardIndex.open(tmp_path)):
        assert index.pictures.tolist() == [4, 0, 3, 2, 1]
        further = []
        for i in range(5):
            shown = [index.read(i)[name] for name in pictures_among(index.extensions(i))]
            sizes = [[0, 0] if data == b"junk" else list(load_rgb(data).size) for data in shown]
            assert not sizes or index.image_sizes[i].tolist() == sizes[0]
            further += sizes[1:]
        assert index.further_sizes.tolist() == further and further[:3] == [[5, 4], [0, 0], [6, 8]]
        assert len(index.sizes) == 9
    summary = stats(index)
    assert (summary["pictures"], summary["pictures_unreadable"]) == (10, 1)
    assert summary["pictures_per_sample"] == {"min": 0, "median": 2.0, "max": 4} and summary["width"]["max"] == 9


def test_the_most_pictures_have_members_and_one_more_has_none(tmp_path):
    most = picture_members([("png", png())] * MOST_PICTURES)
    assert most.keys() <= set(EXTENSIONS)
    write_tar(tmp_path / "0.tar", *((f"x.{name}", png()) for name in (*most, f"{MOST_PICTURES - 1}.png")))
    assert build_index(tmp_path).pictures.tolist() == [MOST_PICTURES]


def test_an_index_without_further_pictures_has_no_sizes_of_them(root):
    build_index(root)
    with zipfile.ZipFile(root / INDEX_NAME) as file:
        assert "further_sizes.npy" not in file.namelist()
    index = ShardIndex.open(root)
    assert index.image_sizes[0].tolist() == [8, 6] and not len(index.further_sizes)
    write_tar(root / "2.tar", ("x.png", png()), ("x.0.png", png()))
    build_index(root)
    arrays = dict(np.load(root / INDEX_NAME))
    np.savez(root / INDEX_NAME, **{name: array for name, array in arrays.items() if name != "further_sizes"})
    with pytest.raises(DataError, match="it lacks the sizes of further pictures"):
        ShardIndex.open(root)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png()), ("b.png", png()), ("a.json", b"{}")], r"0\.tar, byte \d+: .*'a' are not adjacent"),
        ([("a.png", png()), ("a.PNG", png())], r"'a' has the member \.png twice"),
        ([("a.png", png()), ("b.txt", b"x")], r"'b' has no \.png or \.jpg \(it has \.txt\)"),
        ([("a.pyd", b"cos\nsystem\n(S'touch marker'\ntR.")], r"hold no samples, only \.pyd \(1\); .* first dot"),
        ([("22.05.png", png()), ("22.05.txt", b"x")], r"only \.05\.png \(1\), \.05\.txt \(1\); .* first dot"),
        ([], r"hold no samples\.$"),
    ],
)
def test_bad_members_are_errors(tmp_path, monkeypatch, members, message):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "set" / "0.tar", *members)
    with pytest.raises(DataError, match=message):
        build_index(tmp_path / "set", required=("png|jpg",))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "set"]  # no marker, no index


FOREIGN = ["a.txt", "._a.txt", "a.url", "a.PTH", "a.json.gz", "a.left.png", "README", ".DS_Store", "__MACOSX/a.txt",
           "__MACOSX/._a.txt", "__meta__/a.json", "a.json"]  # fmt: skip


def test_foreign_members_are_skipped_and_counted(tmp_path):
    write_tar(tmp_path / "0.tar", *((name, b"{}") for name in FOREIGN), ("b.Json", b"{broken"))
    for index in (build_index(tmp_path), ShardIndex.open(tmp_path)):
        assert list(index.keys) == ["a", "b"] and index.extensions(0) == ["txt", "json"]
        assert index.notes.skipped == {
            "._*": 1, ".url": 1, ".pth": 1, ".json.gz": 1, ".left.png": 1, "without extension": 1, ".DS_Store": 1,
            "__MACOSX": 2, "__meta__": 1,
        }  # fmt: skip
        assert index.notes.bad_records == 1 and "does not parse" in index.notes.examples["b"]
    summary = stats(index)
    assert summary["records_unreadable"] == 1 and summary["members_not_read"]["__MACOSX"] == 2
    many = [(f"s{i}.x{i}", b"") for i in range(30)]
    write_tar(tmp_path / "0.tar", ("a.txt", b"a"), *many)
    assert build_index(tmp_path).notes.skipped["other"] == 10


NAMES = ["猫.jpg", "cat's.jpg", "a b (1).jpg", "e\u0301.jpg", "😀/x.jpg", "./y.jpg", "a.b/c.jpg", "/abs/z.jpg",
         "../up.jpg", "tab\t.jpg", "long/" + "n" * 120 + ".jpg", "UPPER.JPG", "-.jpg", "#%?*.jpg",
         "q\"<b>.jpg"]  # fmt: skip


def test_keys_are_those_of_webdataset(tmp_path):
    from webdataset.compat import WebDataset

    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
            for name in NAMES:
                tar.addfile(tarfile.TarInfo(name))
        expected = [one["__key__"] for one in WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)]
        assert list(build_index(tmp_path).keys) == expected and len(expected) == len(NAMES)
        assert list(ShardIndex.open(tmp_path).keys) == expected


def test_a_key_in_two_shards(root):
    write_tar(root / "00002.tar", *sample("b"))
    with pytest.raises(DataError, match=r"'b' is in two shards .*00000\.tar and 00002\.tar"):
        build_index(root)


def test_truncated_shard_is_an_error_and_leaves_the_old_index(root):
    before = build_index(root).hash
    whole = (root / "00001.tar").read_bytes()
    (root / "00001.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"00001\.tar, byte"):
        build_index(root)
    (root / "00001.tar").write_bytes(whole)
    assert ShardIndex.open(root).hash == before


@pytest.mark.parametrize("name", ["pipe:touch marker", "http://host/a.tar", "s3://bucket/set", "file:///tmp"])
def test_commands_and_urls_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for reach in (build_index, ShardIndex.open):
        with pytest.raises(DataError, match="never read from commands or URLs"):
            reach(name)
    assert not list(tmp_path.iterdir())


def test_compressed_tars_are_errors(root):
    (root / "x.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"x\.tar\.gz is compressed"):
        build_index(root)
    (root / "x.tar.gz").rename(root / "x.tar")
    with pytest.raises(DataError, match=r"x\.tar is compressed \(gzip\)"):
        build_index(root)


def test_missing_folder_file_or_index(root, tmp_path):
    with pytest.raises(DataError, match="Did you mean 'set'"):
        ShardIndex.open(tmp_path / "sett")
    with pytest.raises(DataError, match="is a file"):
        build_index(root / "00000.tar")
    with pytest.raises(DataError, match="mmlab shards index"):
        ShardIndex.open(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.tar files"):
        build_index(tmp_path / "empty")


def test_a_stale_index_is_refused(root):
    build_index(root)
    write_tar(root / "00002.tar", *sample("d"))
    with pytest.raises(DataError, match=r"00002\.tar .* was added.*mmlab shards index"):
        ShardIndex.open(root)
    (root / "00002.tar").unlink()
    with open(root / "00001.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"00001\.tar has \d+ bytes"):
        ShardIndex.open(root)
    (root / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar .* was removed"):
        ShardIndex.open(root)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", pickle.dumps({"hash": 1})])
def test_a_broken_index_is_refused(root, content):
    (root / INDEX_NAME).write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        ShardIndex.open(root)


def test_an_index_with_pickled_objects_is_not_loaded(root):
    class Marker:
        def __reduce__(self):
            return os.mkdir, (str(root / "marker"),)

    np.savez(root / INDEX_NAME, version=np.array([Marker()], dtype=object))
    with pytest.raises(DataError, match="cannot be read"):
        ShardIndex.open(root)
    assert not (root / "marker").exists()


def test_a_flipped_payload_byte_is_a_sample_error(root):
    index = build_index(root)
    path = root / "00000.tar"
    data = bytearray(path.read_bytes())
    data[int(index.table(0).offset[2]) + 20] ^= 1
    path.write_bytes(data)
    index = ShardIndex.open(root)
    assert index.read(0)
    with pytest.raises(SampleError, match=r"00000\.tar: b\.png") as caught:
        index.read(1)
    assert caught.value.reason == "checksum"


def test_a_shard_cut_after_opening_is_a_sample_error(root):
    index = build_index(root)
    index.read(0)
    os.truncate(root / "00000.tar", 600)
    with pytest.raises(SampleError) as caught:
        index.read(1)
    assert caught.value.reason == "checksum"


def _keys(index: ShardIndex) -> list[bytes]:
    return [index.read(i)["json"] for i in range(len(index))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(root, method):
    index = build_index(root)
    expected = _keys(index)  # opens the descriptors before the fork
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(_keys, [index] * 2) == [expected] * 2


def test_a_pickled_index_is_small_and_refuses_other_contents(root):
    index = build_index(root)
    frozen = pickle.dumps(index)
    assert len(frozen) < 500
    assert pickle.loads(frozen).hash == index.hash
    write_tar(root / "00001.tar", *sample("c", "four!"))
    build_index(root)
    with pytest.raises(DataError, match="rebuilt"):
        pickle.loads(frozen)


def test_many_shards_do_not_use_up_the_descriptors(tmp_path):
    for i in range(80):
        write_tar(tmp_path / f"{i:03d}.tar", (f"k{i}.txt", b"x"))
    index = build_index(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for i in range(80):
        index.read(i)
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 64


@pytest.fixture
def small(root) -> ShardIndex:
    return build_index(root, quiet=True)


def as_npz(path, **headers):
    """An index file whose arrays state other shapes than they have."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if headers.pop("deflated", False) else 0) as archive:
        for name, (descr, shape) in headers.items():
            member = io.BytesIO()
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            archive.writestr(f"{name}.npy", member.getvalue() + b"\0" * 64)


@pytest.mark.parametrize(
    "headers",
    [
        {"version": ("<i8", (1 << 60,))},
        {"version": ("<i8", (1 << 40, 1 << 40))},
        {"version": ("|S4000000000", (1 << 30,))},
        {"version": ("|O", (8,))},
        {"version": ("<i8", (-(1 << 40),))},
        {"version": ("<i8", (8,)), "deflated": True},
    ],
    ids=["long", "overflow", "wide", "object", "negative", "compressed"],
)
def test_an_index_that_states_huge_arrays_is_a_data_error(small, headers):
    as_npz(small.root / INDEX_NAME, **headers)
    with pytest.raises(DataError, match="cannot be read"):
        ShardIndex.open(small.root)


@pytest.mark.parametrize("name", ["length", "offset", "first", "extension", "type_codes"])
@pytest.mark.parametrize("value", [-1, 1 << 55])
def test_an_index_that_names_places_outside_its_shards_is_a_data_error(small, name, value):
    with np.load(small.root / INDEX_NAME) as file:
        arrays = dict(file)
    arrays[name][-1] = 255 if arrays[name].itemsize == 1 else value
    np.savez(small.root / INDEX_NAME, **arrays)
    with pytest.raises(DataError, match="cannot be read"):
        ShardIndex.open(small.root)


def test_the_index_of_a_read_only_folder_is_in_the_cache(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MMLAB_INDEX_DIR", str(tmp_path / "cache"))
    (small.root / INDEX_NAME).unlink()
    replacing = index_arrays.replacing

    def read_only(path):
        if path.parent == small.root:
            raise RunError("read-only")
        return replacing(path)

    monkeypatch.setattr(index_arrays, "replacing", read_only)
    index = build_index(small.root, quiet=True)
    assert not (small.root / INDEX_NAME).exists() and f"is in {tmp_path}/cache/" in capsys.readouterr().err
    assert ShardIndex.open(small.root).hash == index.hash == small.hash
    (small.root / INDEX_NAME).write_bytes(b"of another time")
    assert ShardIndex.open(small.root).hash == index.hash
    with pytest.raises(RunError):
        build_index(small.root, quiet=True, elsewhere=False)
