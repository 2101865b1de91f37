import io
import os
import tarfile

import pytest

from mmlab.config.errors import DataError
from mmlab.data.tar import BLOCK, walk

FILES = {
    "a.txt": b"one",
    "dir/b.txt": b"x" * BLOCK,
    "dir/" + "long" * 40 + ".txt": b"",
    "d/" + "e" * 99 + "/" + "f" * 60 + ".txt": b"split into a prefix",
}


def write_tar(path, files=None, form=tarfile.PAX_FORMAT, **info):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in (FILES if files is None else files).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in info.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
    return path


def read_all(path) -> dict[str, bytes]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return {member.name: os.pread(fd, member.size, member.offset) for member in walk(fd, path)}
    finally:
        os.close(fd)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_and_bytes_are_those_of_tarfile(tmp_path, form):
    assert read_all(write_tar(tmp_path / "a.tar", form=form)) == FILES


def test_ustar_prefix_and_directories(tmp_path):
    path = tmp_path / "a.tar"
    name = "p" * 90 + "/" + "q" * 90 + ".txt"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        directory = tarfile.TarInfo("some")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        member = tarfile.TarInfo(name)
        member.size = 2
        tar.addfile(member, io.BytesIO(b"ok"))
    assert read_all(path) == {name: b"ok"}


def test_pax_headers_of_other_kinds_are_skipped(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"é.txt": b"1"}, pax_headers={"comment": "hello", "mtime": "1.5"})
    assert read_all(path) == {"é.txt": b"1"}


def test_a_checksum_over_signed_bytes(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"é.txt": b"1"}, form=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    signed = sum(byte - 256 if byte > 127 else byte for byte in data[:148] + b" " * 8 + data[156:BLOCK])
    data[148:154] = b"%06o" % signed
    path.write_bytes(data)
    assert read_all(path) == {"é.txt": b"1"}
    data[148:154] = b"%06o" % (signed + 1)
    path.write_bytes(data)
    with pytest.raises(DataError, match="checksum"):
        read_all(path)


def test_every_truncation_is_an_error(tmp_path):
    """Cut at each block, inside each header and inside each payload, up to the second end block."""
    whole = write_tar(tmp_path / "a.tar", {"a.txt": b"x" * 700, "b.txt": b"y" * 10}).read_bytes()
    end = BLOCK + 2 * BLOCK + BLOCK + BLOCK + 2 * BLOCK
    cut = tmp_path / "cut.tar"
    for length in {*range(0, end, 100), *range(0, end, BLOCK), end - 1}:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar"):
            read_all(cut)
    cut.write_bytes(whole[: BLOCK + 100])
    with pytest.raises(DataError, match=r"byte 0: member 'a\.txt' is truncated: it has 700 bytes, 100 are left"):
        read_all(cut)
    cut.write_bytes(whole[:end])
    assert len(read_all(cut)) == 2


def test_a_flipped_header_byte_is_an_error(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {"a.txt": b"x", "b.txt": b"y"}).read_bytes()
    flipped = tmp_path / "flipped.tar"
    for at in [*range(2 * BLOCK, 2 * BLOCK + 360, 3), *range(2 * BLOCK + 360, 3 * BLOCK, 19)]:
        damaged = bytearray(whole)
        damaged[at] ^= 0x40
        flipped.write_bytes(damaged)
        # The two padding characters behind the checksum's digits carry nothing.
        if at - 2 * BLOCK in (154, 155):
            continue
        with pytest.raises(DataError, match=r"flipped\.tar, byte 1024: .*checksum"):
            read_all(flipped)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda whole: whole[: 2 * BLOCK] + bytes(BLOCK) + whole[2 * BLOCK :], "zeros within the archive"),
        (lambda whole: whole + whole, "after the end"),
        (lambda whole: b"\x1f\x8b" + whole, "gzip"),
        (lambda whole: b"hello" * 400, "not a tar"),
        (lambda whole: b"", "is empty"),
    ],
)
def test_damaged_tars_are_errors(tmp_path, make, message):
    path = tmp_path / "a.tar"
    path.write_bytes(make(write_tar(path, {"a.txt": b"x", "b.txt": b"y"}).read_bytes()))
    with pytest.raises(DataError, match=message):
        read_all(path)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_links_to_earlier_members_have_their_bytes(tmp_path, form):
    path, name = tmp_path / "a.tar", "dir/" + "long" * 40 + ".txt"
    links = [("b.txt", tarfile.LNKTYPE, name), ("dir/c.txt", tarfile.SYMTYPE, name.removeprefix("dir/"))]
    with tarfile.open(path, "w", format=form) as tar:
        for link, kind, target in (("", tarfile.REGTYPE, ""), *links):
            member = tarfile.TarInfo(link or name)
            member.type, member.linkname, member.size = kind, target, 0 if link else 3
            tar.addfile(member, None if link else io.BytesIO(b"one"))
    assert read_all(path) == {name: b"one", "b.txt": b"one", "dir/c.txt": b"one"}


def test_names_that_are_not_utf8_and_volume_labels(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        label = tarfile.TarInfo("a backup")
        label.type = b"V"
        tar.addfile(label)
        tar.addfile(tarfile.TarInfo("café.txt"))
    assert read_all(path) == {"caf\\xe9.txt": b""}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", {"a.txt": b""}, type=kind, linkname="/etc/passwd")
    with pytest.raises(DataError, match="not a regular file"):
        read_all(path)


def test_a_file_whose_name_ends_in_a_slash(tmp_path):
    """It is a directory only where tar had no type for these."""
    path = write_tar(tmp_path / "a.tar", {"a.txt/": b"x" * 600, "b.txt": b"y"})
    assert read_all(path) == {"a.txt/": b"x" * 600, "b.txt": b"y"}
