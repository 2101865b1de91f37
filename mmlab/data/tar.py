"""A strict walk over an uncompressed tar file, in which any truncation or damage is an error.

Python's `tarfile` treats a broken header within the file as the end of the archive and silently drops the rest.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from posixpath import dirname, join, normpath
from typing import Any, NoReturn

from mmlab.config.errors import DataError
from mmlab.config.locations import Location
from mmlab.data.formats import MEMBER_CAP

BLOCK = 512
_ZEROS = bytes(BLOCK)
_EXTENDED_CAP = 1 << 20
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_EXTENDED = "LKxg"  # headers that replace fields of the member after them: its name, its link's target, or several
_DIRECTORY = "5"
_EMPTY = "125"  # links and directories have no bytes of their own
_HARMLESS = (_DIRECTORY, "V", "D")  # a directory, GNU's label of a volume, GNU's list of a directory
_KINDS = {
    "1": "a hard link to something that is not before it in this tar",
    "2": "a symbolic link to something that is not before it in this tar",
    "3": "a device",
    "4": "a device",
    "6": "a pipe",
    "S": "a sparse file",
}


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file in a tar: its name, the offsets of its header and of its bytes, and its size in bytes."""

    name: str
    header: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Header:
    """One header block; `kind` is tar's type flag, "0" for every variant of a regular file."""

    kind: str
    name: str
    size: int
    target: str = ""  # of a link


def walk(fd: int, path: Location) -> Iterator[TarMember]:
    """Yield the regular files of an open ustar, GNU or pax archive; directories are skipped.

    A link to an earlier member, as tar writes for a file that occurs twice, has that member's bytes. A byte of a name
    that is not UTF-8 becomes text, such as `\\xe9`.

    Raises:
        DataError: naming `path` and the byte, for a bad checksum, any truncation, missing end blocks, data after
            the end, other links and devices, or a compressed file.
    """
    length = os.fstat(fd).st_size
    _check_start(fd, path, length)
    at = 0
    extended: dict[str, Any] = {}  # fields that extended headers state for the member after them
    before: dict[str, TarMember] = {}
    while (header := _header_at(fd, path, at)) is not None:
        if header.kind not in _EXTENDED:
            header = replace(header, **{**extended, **({"size": 0} if header.kind in _EMPTY else {})})
        payload = at + BLOCK
        following = payload + -(-header.size // BLOCK) * BLOCK
        if following > length:
            left = max(length - payload, 0)
            fail(path, at, f"member {header.name!r} is truncated: it has {header.size} bytes, {left} are left")
        if header.kind in _EXTENDED:
            extended |= _read_extended(header, fd, payload, path, at)
        else:
            extended = {}
            if header.kind not in _HARMLESS:
                member = _member(header, before, payload, path, at)
                before[normpath(member.name)] = member
                yield member
        at = following
    if extended:
        fail(path, at, "the archive ends after an extended header")
    _check_end(fd, path, at, length)


def _member(header: _Header, before: dict[str, TarMember], payload: int, path: Location, at: int) -> TarMember:
    """The regular file of a header, or the earlier one that it is a link to."""
    start = dirname(header.name) if header.kind == "2" else ""
    target = normpath(join(start, header.target))
    if header.kind in "12" and target in before:
        return replace(before[target], name=header.name, header=at)
    if header.kind != "0":
        what = _KINDS.get(header.kind, f"of type {header.kind!r}")
        fail(path, at, f"member {header.name!r} is {what}, not a regular file")
    if header.size > MEMBER_CAP:
        fail(path, at, f"member {header.name!r} has {header.size} bytes; the cap is {MEMBER_CAP}")
    return TarMember(header.name, at, payload, header.size)


def fail(path: Location, at: int, reason: str) -> NoReturn:
    """Raise DataError, naming shard, byte and reason."""
    raise DataError(f"{path}, byte {at}: {reason}.")


def _check_start(fd: int, path: Location, length: int) -> None:
    start = os.pread(fd, 8, 0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(f"{path} is compressed ({name}); decompress it to a plain .tar first.")
    if not length:
        raise DataError(f"{path} is empty, not a tar file.")


def _check_end(fd: int, path: Location, at: int, length: int) -> None:
    if os.pread(fd, BLOCK, at + BLOCK) != _ZEROS:
        if at + 2 * BLOCK > length:
            fail(path, at, "the archive is truncated: the second end block is missing")
        fail(path, at, "a block of zeros within the archive; the rest would never be read")
    at += 2 * BLOCK
    while chunk := os.pread(fd, 1 << 20, at):
        if chunk.count(0) != len(chunk):
            fail(path, at, "there is data after the end of the archive (tars joined by cat?)")
        at += len(chunk)


def _header_at(fd: int, path: Location, at: int) -> _Header | None:
    """The header at a byte, or None for a block of zeros."""
    block = os.pread(fd, BLOCK, at)
    if len(block) < BLOCK:
        fail(path, at, "the archive is truncated: a header or the two end blocks are missing")
    if block == _ZEROS:
        return None
    if _number(block[148:156]) not in _checksums(block):
        what = "the header's checksum does not match: the archive is damaged"
        fail(path, at, what if at else "this is not a tar file (no valid header)")
    size = _number(block[124:136])
    if size is None:
        fail(path, at, "the header's size field is not a number")
    raw = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and prefix:
        raw = prefix + b"/" + raw
    name, target = _text(raw), _text(block[157:257].split(b"\0", 1)[0])
    kind = "0" if block[156] in (0, ord("7")) else chr(block[156])  # "7" was a file in one piece on its disk
    if block[156] == 0 and name.endswith("/"):
        kind = _DIRECTORY  # before ustar, a directory was a file whose name ends in a slash
    return _Header(kind, name, 0 if kind in _EMPTY else size, target)


def _checksums(block: bytes) -> tuple[int, int]:
    """The header's checksum, and its variant over signed bytes that old writers used."""
    blanked = block[:148] + b" " * 8 + block[156:]
    total = sum(blanked)
    return total, total if blanked.isascii() else sum(memoryview(blanked).cast("b"))


def _number(field: bytes) -> int | None:
    """An octal number, or GNU's base 256 for sizes of more than eleven digits."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    match = re.fullmatch(rb" *([0-7]+)[ \0]*", field)
    return int(match[1], 8) if match else None


def _text(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace").replace("\0", "\\x00")


def _read_extended(header: _Header, fd: int, offset: int, path: Location, at: int) -> dict[str, Any]:
    """The fields that an extended header replaces in the next member's header."""
    if header.size > _EXTENDED_CAP:
        fail(path, at, f"an extended header has {header.size} bytes; the cap is {_EXTENDED_CAP}")
    data = os.pread(fd, header.size, offset)
    if header.kind in "LK":
        return {"name" if header.kind == "L" else "target": _text(data.split(b"\0", 1)[0])}
    records = _pax_records(data, path, at)
    if any(key.startswith(b"GNU.sparse") for key in records):
        fail(path, at, "sparse files are not supported")
    stated: dict[str, Any] = {}
    if b"path" in records:
        stated["name"] = _text(records[b"path"])
    if b"linkpath" in records:
        stated["target"] = _text(records[b"linkpath"])
    if b"size" in records:
        if not re.fullmatch(rb"[0-9]{1,18}", records[b"size"]):
            fail(path, at, f"the pax header's size {records[b'size']!r} is not a number")
        stated["size"] = int(records[b"size"])
    if stated and header.kind == "g":
        fail(path, at, "a global header sets the path or size of every member")
    return stated


def _pax_records(data: bytes, path: Location, at: int) -> dict[bytes, bytes]:
    """Parse pax records, each `<length> <key>=<value>\\n`; the length is that of the whole record."""
    records, rest = {}, data
    while rest:
        match = re.match(rb"([0-9]{1,7}) ", rest)
        if match is None:
            fail(path, at, "a malformed pax header")
        record = rest[: int(match[1])]
        key, equals, value = record[match.end() : -1].partition(b"=")
        if not equals or not record.endswith(b"\n") or len(record) != int(match[1]):
            fail(path, at, "a malformed pax header")
        records[key] = value
        rest = rest[len(record) :]
    return records
