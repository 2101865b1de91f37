import pytest

from mmlab.config.errors import DataError
from mmlab.data.verification import verify
from tests.tiny_sets import tiny_set


def test_verify_finds_a_flipped_byte_and_names_the_sample(tmp_path):
    index = tiny_set(tmp_path / "set")
    verify(index, quiet=True)
    path = index.root / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[index.table(1).members(1)[0][1]] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000001\.tar .*'s3'.*checksum"):
        verify(index, quiet=True)


def test_verify_finds_a_damaged_header(tmp_path):
    index = tiny_set(tmp_path / "set")
    path = index.root / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        verify(index, quiet=True)
