import pytest

from mmlab.config.errors import DataError
from mmlab.data.sample_types import SampleError
from mmlab.data.tar_samples import OpenTar
from tests.tiny_shards import plain_tar


def test_samples_are_found_by_webdatasets_rule_and_read_later(tmp_path):
    path = plain_tar(
        tmp_path / "0.tar",
        ("a.JPG", b"picture"),
        ("a.seg.png", b"other"),
        ("a.json", b"{}"),
        ("._a.jpg", b"mac"),
        ("b.c/d.txt", b"text"),
        ("README", b"no extension"),
    )
    first, second = OpenTar(path, path).samples()
    assert (first.key, list(first.members)) == ("a", ["jpg", "json"])
    path.unlink()  # it stays open
    assert first.read(["jpg", "txt"]) == {"jpg": b"picture"}
    assert (second.key, second.read(["txt"])) == ("b.c/d", {"txt": b"text"})


def test_repeated_keys_and_members_are_faults_of_their_samples(tmp_path):
    names = ["a.txt", "b.txt", "a.json", "c.txt", "c.TXT", "d.txt"]
    path = plain_tar(tmp_path / "0.tar", *((name, b"x") for name in names))
    samples = list(OpenTar(path, path).samples())
    assert [(sample.key, sample.fault and sample.fault.reason) for sample in samples] == [
        ("a", None), ("b", None), ("a", "key"), ("c", "member"), ("d", None),
    ]  # fmt: skip
    with pytest.raises(SampleError, match=r"0\.tar: the members of 'a' are not adjacent, or the key is used twice"):
        samples[2].read(["json"])


def test_a_truncated_shard_is_an_error_after_its_whole_samples(tmp_path):
    path = plain_tar(tmp_path / "0.tar", *((f"{name}.txt", bytes(600)) for name in "abc"))
    path.write_bytes(path.read_bytes()[:3300])
    samples = OpenTar(path, path).samples()
    assert next(samples).key == "a"
    with pytest.raises(DataError, match=r"0\.tar, byte 3072: the archive is truncated"):
        list(samples)


def test_a_shard_that_shrinks_after_its_walk_is_an_error(tmp_path):
    path = plain_tar(tmp_path / "0.tar", ("a.txt", bytes(600)))
    (sample,) = OpenTar(path, path).samples()
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"0\.tar, byte 512: 'a\.txt' could not be read completely"):
        sample.read(["txt"])


def test_equal_keys_of_two_shards_stand_for_different_samples(tmp_path):
    one, two = (plain_tar(tmp_path / f"{n}.tar", ("a.txt", b"x")) for n in range(2))
    assert OpenTar(one, one).hash != OpenTar(two, two).hash
