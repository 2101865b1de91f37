import gzip
import json
import tarfile

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.sources.tars import tars
from tests.tiny_builds import built
from tests.tiny_files import jpeg, png, write_tar


def records(index) -> dict[str, dict]:
    return {str(key): json.loads(index.read(i)["json"]) for i, key in enumerate(index.keys)}


def test_members_of_other_names(tmp_path):
    members = [
        *(("a/1.input.jpg", png()), ("a/._1.output.txt", b"mac"), ("a/1.output.txt", "größe\n".encode())),
        *(("a/1.url", b"http://x"), ("__meta__", b"x")),
        *(("猫.input.jpg", jpeg()), ("猫.output.txt", b"\xff")),
        *(("b.input.jpg", jpeg()), ("b.other.txt", b"x")),
        *(("c.input.jpg", jpeg()[:300]), ("c.output.txt", b"x")),
        *(("d.input.jpg", jpeg()), ("d.output.txt", b"dog")),
    ]
    path = write_tar(tmp_path / "x.tar", *members)
    index, tally = built(tars(path, {"image": "input.jpg", "text": "output.txt"}), tmp_path / "out")
    assert records(index) == {"a_1": {"id": "a/1", "caption": "größe"}, "d": {"id": "d", "caption": "dog"}}
    assert index.read(0)["png"] == png()
    assert tally.left_out == {"unicode": 1, "no-member": 1, "decode": 1}
    assert "It has no .output.txt, but .input.jpg, .other.txt." in tally.examples["no-member"]
    assert tally.details["not read .url"] == 1 and tally.details["members_without_a_sample"] == 2


def test_usual_names_records_and_classes(tmp_path):
    record = {"type": "vqa", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    write_tar(tmp_path / "t/1.tar", ("1.jpg", jpeg()), ("1.json", json.dumps(record).encode()), ("1.cls", b"5"))
    write_tar(tmp_path / "t/0.tar", ("0.JPEG", jpeg()), ("0.txt", b""), ("2.json", b"[1]"), ("3.pyd", b"x"))
    write_tar(tmp_path / "t/2.tar", ("4.jpg", jpeg()), ("4.png", png()), ("5.txt.gz", gzip.compress(b"packed")))
    (tmp_path / "t/readme.md").touch()
    index, tally = built(tars(tmp_path / "t"), tmp_path / "out")
    assert records(index) == {
        **{"0": {"id": "0"}, "1": {"id": "1", "class": "5", **record}, "5": {"id": "5", "caption": "packed"}},
    }
    assert index.type_of(1) == "vqa" and tally.left_out == {"json": 1, "no-member": 1, "pictures": 1}
    assert "choose one with --members image=jpg" in tally.examples["pictures"]
    broken = {"questions": [{"question": "q", "answer": ""}]}
    write_tar(tmp_path / "t/3.tar", ("6.jpg", jpeg()), ("6.json", json.dumps(broken).encode()))
    assert built(tars(tmp_path / "t"), tmp_path / "out")[1].left_out["empty-answer"] == 1


def test_several_images_by_number_or_by_name(tmp_path):
    talk = {"conversations": [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "a"}]}
    record = json.dumps(talk).encode()
    path = write_tar(
        tmp_path / "x.tar",
        *(("a.jpg", jpeg()), ("a.0.png", png()), ("a.json", record)),
        *(("b.1.jpg", jpeg()), ("b.0.png", png()), ("b.json", record)),
        *(("c.0.jpg", jpeg()), ("c.1.jpg", jpeg()), ("c.2.jpg", jpeg()), ("c.json", record)),
        *(("d.0.jpg", jpeg()), ("d.0.png", png()), ("d.json", b"{}")),
    )
    index, tally = built(tars(path), tmp_path / "out")
    assert [(*index.read(i),) for i in range(2)] == [("0.png", "jpg", "json"), ("0.jpg", "json", "png")]
    assert tally.left_out == {"pictures": 2} and tally.details["several_images"] == 2
    members = [("a.left.png", png()), ("a.right.jpg", jpeg()), ("b.left.png", png()), ("c.right.jpg", jpeg())]
    path = write_tar(tmp_path / "y.tar", *members)
    index, tally = built(tars(path, {"image1": "right.jpg", "image0": "left.png"}), tmp_path / "named")
    assert list(index.keys) == ["a"] and [*index.read(0)] == ["0.jpg", "json", "png"]
    assert tally.left_out == {"no-member": 2}
    with pytest.raises(ConfigError, match=r"Options: image, text, json, class; image0, image1, … are further images"):
        tars(path, {"image32": "x"})


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_the_same(tmp_path, mode):
    plain = write_tar(tmp_path / "x.tar", ("a.png", png()), ("a.txt", b"cat"))
    with tarfile.open(tmp_path / f"y.tar.{mode}", f"w:{mode}") as packed, tarfile.open(plain) as tar:
        for member in tar:
            packed.addfile(member, tar.extractfile(member))
    for name in ("x.tar", f"y.tar.{mode}"):
        built(tars(tmp_path / name), tmp_path / "out" / name, workers=2)
    contents = [(tmp_path / "out" / name / "shard-000000.tar").read_bytes() for name in ("x.tar", f"y.tar.{mode}")]
    assert contents[0] == contents[1]
    path = tmp_path / f"y.tar.{mode}"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be unpacked"):
        built(tars(path), tmp_path / "cut")


def test_damaged_tars_and_wrong_names_are_errors(tmp_path):
    path = write_tar(tmp_path / "x.tar", ("a.png", png()), ("b.png", png()))
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"x\.tar, byte \d+: the archive is truncated"):
        built(tars(path), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no member 'imgae'\. Did you mean 'image'"):
        tars(path, {"imgae": "jpg"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"there is no .*nowhere"):
        tars(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no tar"):
        tars(tmp_path / "empty")
