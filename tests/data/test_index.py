import io
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.formats import EXTENSIONS, MOST_PICTURES, picture_members, pictures_among
from mmlab.data.images import load_rgb
from mmlab.data.index import ShardIndex
from mmlab.data.indexing import build_index, index_set
from mmlab.data.sample_types import SampleError
from mmlab.data.shard_stats import stats
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
    for name, values in (("image_sizes", [[8, 6]] * 3), ("text_lengths", [11, 3, 5])):
        assert index.joined(name).tolist() == values and index.joined(name).dtype == np.int32
    assert index.joined("text_lengths", [1]).tolist() == [5]
    assert [index.find(key) for key in ("c", "dir.x/a", "d")] == [2, 0, None]
    assert index.read(1) == {"png": png(), "json": b'{"caption": "two"}'}
    assert list(index.read(2, only=["json"])) == ["json"]
    with pytest.raises(IndexError):
        index.read(3)


def test_open_returns_what_build_returned(root):
    built, opened = build_index(root), ShardIndex.open(root)
    assert opened.hash == built.hash and list(opened.keys) == list(built.keys)
    assert [opened.read(i) for i in range(3)] == [built.read(i) for i in range(3)]
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*"))]
    assert names == [
        "00000.tar", "00001.tar", INDEX_NAME,
        "index/00000.safetensors", "index/00001.safetensors", "index/manifest.json",
    ]  # fmt: skip


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
    assert plain.notes.question_types == {} and stats(plain)["question_types"] is None


def test_a_different_type_for_each_sample_is_ignored(tmp_path):
    write_tar(tmp_path / "0.tar", *((f"s{i}.json", json.dumps({"type": f"t{i}"}).encode()) for i in range(300)))
    assert build_index(tmp_path).type_names == ("",)


def test_hash_depends_only_on_the_contents(root, tmp_path):
    first = build_index(root).hash
    root.rename(tmp_path / "moved")
    assert build_index(tmp_path / "moved").hash == first
    write_tar(tmp_path / "moved" / "00001.tar", *sample("c", "THREE"))
    assert build_index(tmp_path / "moved").hash != first


def test_side_files_of_img2dataset_are_ignored(root):
    (root / "00000.parquet").write_bytes(b"PAR1")
    (root / "00000_stats.json").write_text("{}")
    null = ("x.json", b'{"caption": null}')
    write_tar(root / "00002.tar", ("x.jpg", b"\xff\xd8\xff"), ("x.txt", "grün".encode()), null)
    index = build_index(root)
    assert len(index) == 4
    assert index.joined("text_lengths")[3] == 4  # the caption of the text file, as the JSON has none
    assert index.joined("image_sizes")[3].tolist() == [0, 0]  # unreadable: the reader's to replace


def test_a_bomb_is_recorded_not_fatal(tmp_path):
    write_tar(tmp_path / "0.tar", ("x.jpg", bomb()))
    assert build_index(tmp_path).joined("image_sizes").tolist() == [[30000, 30000]]


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
        assert index.joined("pictures").tolist() == [4, 0, 3, 2, 1]
        further = []
        for i in range(5):
            shown = [index.read(i)[name] for name in pictures_among(index.extensions(i))]
            sizes = [[0, 0] if data == b"junk" else list(load_rgb(data).size) for data in shown]
            assert not sizes or index.joined("image_sizes")[i].tolist() == sizes[0]
            further += sizes[1:]
        assert index.joined("further_sizes").tolist() == further and further[:3] == [[5, 4], [0, 0], [6, 8]]
    summary = stats(index)
    assert (summary["pictures"], summary["pictures_unreadable"]) == (10, 1)
    assert summary["pictures_per_sample"] == {"min": 0, "median": 2.0, "max": 4} and summary["width"]["max"] == 9


def test_the_most_pictures_have_members_and_one_more_has_none(tmp_path):
    most = picture_members([("png", png())] * MOST_PICTURES)
    assert most.keys() <= set(EXTENSIONS)
    write_tar(tmp_path / "0.tar", *((f"x.{name}", png()) for name in (*most, f"{MOST_PICTURES - 1}.png")))
    assert build_index(tmp_path).joined("pictures").tolist() == [MOST_PICTURES]


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
    names = {path.name for path in tmp_path.rglob("*")}
    assert names in ({"0.tar", "set"}, {"0.tar", "set", INDEX_NAME, "0.safetensors"})  # no marker, no manifest


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


@pytest.mark.parametrize("name", ["pipe:touch marker", "file:///tmp", "PIPE:touch marker"])
def test_commands_and_addresses_of_files_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"commands never run|no address of a store"):
        build_index(name)
    monkeypatch.setenv("MMLAB_SHARD_CACHE", str(tmp_path / "cache"))
    with pytest.raises((ConfigError, DataError), match=r"commands never run|no address of a store"):
        ShardIndex.open(name)
    assert not list(tmp_path.iterdir()), "nor is a fetcher started"


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


def test_an_index_that_is_rebuilt_while_it_is_used(root):
    used = build_index(root)
    index_set(root, again=True, quiet=True)  # with equal contents
    assert used.read(2) == ShardIndex.open(root).read(2)
    used = ShardIndex.open(root)
    assert used.read(0)
    write_tar(root / "00001.tar", *sample("c", "THREE"))
    build_index(root)
    assert used.read(0)
    with pytest.raises(DataError, match="was rebuilt with other contents while it was in use"):
        used.read(2)
    assert b"THREE" in ShardIndex.open(root).read(2)["json"]


def test_many_shards_use_up_neither_descriptors_nor_maps(tmp_path):
    for i in range(140):
        write_tar(tmp_path / f"{i:03d}.tar", (f"k{i}.txt", b"x"))
    index = build_index(tmp_path, quiet=True)
    before = _open()
    for i in range(140):
        index.read(i)
    after = _open()
    assert after["fd"] - before["fd"] <= 64 and after["maps"] - before["maps"] <= 34


def _open() -> dict[str, int]:
    """Numbers of descriptors and maps of this process; where nobody counts them, none."""
    if not os.path.isdir("/proc/self"):
        return {"fd": 0, "maps": 0}
    return {"fd": len(os.listdir("/proc/self/fd")), "maps": len(Path("/proc/self/maps").read_text().splitlines())}
