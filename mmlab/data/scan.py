"""One shard as arrays: samples, positions of their members, checksums, image sizes and text lengths."""

import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from mmlab.config.errors import DataError, nearest
from mmlab.data.formats import (
    EXTENSIONS,
    foreign_kind,
    parse_record,
    pictures_among,
    question_types,
    record_texts,
    record_type,
    split_name,
)
from mmlab.data.images import size_in
from mmlab.data.progress_bar import progress
from mmlab.data.sample_types import SampleError
from mmlab.data.tar import TarMember, fail, walk

_INT32 = np.iinfo(np.int32).max
MOST_TYPES = 256
"""Response types of a set; more of them are some other field."""
_NAMED = 20  # kinds of members that are not read, and bad records, that an index names
_COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class ShardScan:
    """The contents of one shard. N samples, M members; sample i owns members `first[i]:first[i + 1]`."""

    size: int  # bytes of the shard file
    keys: list[str]  # [N]
    first: np.ndarray  # int64 [N + 1]
    extension: np.ndarray  # uint8 [M], an index into `EXTENSIONS`
    offset: np.ndarray  # int64 [M], first byte of the member's data
    length: np.ndarray  # int64 [M]
    crc: np.ndarray  # uint32 [M]
    image_sizes: np.ndarray  # int32 [N, 2]: width, height of the first picture; 0, 0: none, or an unreadable header
    further_sizes: np.ndarray  # int32 [F, 2]: of the further pictures of the samples, in order
    text_lengths: np.ndarray  # int32 [N]: characters of all texts of the record
    types: list[str]  # [N]: response type of each record, or empty
    skipped: Counter[str]  # members that are not read: extension or other name → number
    bad_records: dict[str, str]  # key → why its record cannot be used
    question_types: Counter[str]  # type → how many questions have it


@dataclass(frozen=True)
class ScanNotes:
    """What was found in the shards beside samples that can be used.

    Attributes:
        skipped: members that are not read, such as `.url` or `._*` → their number; the most common ones, and `other`.
        bad_records: number of records that cannot be used; the reader replaces their samples.
        examples: keys of some of them → what is wrong.
        question_types: type → how many `questions` of records have it; none for sets with too many types.
    """

    skipped: dict[str, int] = field(default_factory=dict)
    bad_records: int = 0
    examples: dict[str, str] = field(default_factory=dict)
    question_types: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One line for each of them that there is."""
        skipped = ", ".join(f"{name} {number:,}" for name, number in self.skipped.items())
        examples = "; ".join(f"{key!r}: {message}" for key, message in list(self.examples.items())[:3])
        records = f"{self.bad_records:,} records cannot be used, such as {examples.rstrip('.')}"
        return [f"members that are not read: {skipped}"] * bool(skipped) + [records] * bool(self.bad_records)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data; question types only where there are any, as indexes always were."""
        return {name: value for name, value in vars(self).items() if value or name != "question_types"}

    @classmethod
    def of(cls, scans: Iterable[ShardScan]) -> "ScanNotes":
        """The notes on several shards."""
        skipped, bad_records, types = Counter[str](), dict[str, str](), Counter[str]()
        for scan in scans:
            skipped += scan.skipped
            types += scan.question_types
            bad_records |= scan.bad_records
        common = dict(skipped.most_common(_NAMED))
        if other := skipped.total() - sum(common.values()):
            common["other"] = other
        named = dict(sorted(types.items())) if len(types) <= MOST_TYPES else {}
        return cls(common, len(bad_records), dict(list(bad_records.items())[:_NAMED]), named)

    def instead(self) -> str:
        """For the message that there are no samples: what there is instead, and what would be a sample."""
        if not self.skipped:
            return ""
        there = ", ".join(f"{name} ({number:,})" for name, number in self.skipped.items())
        return f", only {there}; a member is named 'key.jpg': its extension begins at the first dot of its file name"


def scan_shard(path: Path, required: tuple[str, ...] = ()) -> ShardScan:
    """Read a whole shard.

    Args:
        path: the tar file.
        required: members that each sample must have; `jpg|png` requires one of them.

    Raises:
        DataError: naming the shard, the byte and the reason, for whatever `walk` raises, a member that is required but
            missing, or there twice, or members of a key that are not adjacent.
    """
    keys, seen, first, members, summaries = [], set(), [], [], []
    skipped, bad_records, types = Counter[str](), dict[str, str](), Counter[str]()
    sample: dict[str, bytes] = {}
    close = partial(_close, required=required, path=path, bad_records=bad_records, types=types)
    with open(path, "rb") as file:
        fd = file.fileno()
        for member in walk(fd, path):
            parts, foreign = split_name(member.name), foreign_kind(member.name)
            if parts is None or foreign is not None:
                skipped[foreign if foreign and foreign.isprintable() else repr(foreign)] += 1
                continue
            key, extension = parts
            if not keys or key != keys[-1]:
                if key in seen:
                    why = f"the members of {key!r} are not adjacent, or the key is used twice"
                    fail(path, member.header, f"member {member.name!r}: {why}")
                if keys:
                    summaries.append(close(sample, keys[-1], at=member.header))
                seen.add(key)
                keys.append(key)
                first.append(len(members))
                sample = {}
            if extension in sample:
                fail(path, member.header, f"sample {key!r} has the member .{extension} twice")
            data = _read(fd, member, path)
            sample[extension] = data
            members.append((EXTENSIONS.index(extension), member.offset, member.size, zlib.crc32(data)))
        size = os.fstat(fd).st_size
        if keys:
            summaries.append(close(sample, keys[-1], at=size))
    table = np.array(members, np.int64).reshape(-1, 4)
    return ShardScan(
        size=size,
        keys=keys,
        first=np.array([*first, len(members)], np.int64),
        extension=table[:, 0].astype(np.uint8),
        offset=table[:, 1],
        length=table[:, 2],
        crc=table[:, 3].astype(np.uint32),
        image_sizes=np.array([sizes[0] for sizes, _, _ in summaries], np.int32).reshape(-1, 2),
        further_sizes=np.array([size for sizes, _, _ in summaries for size in sizes[1:]], np.int32).reshape(-1, 2),
        text_lengths=np.array([length for _, length, _ in summaries], np.int32),
        types=[kind for _, _, kind in summaries],
        skipped=skipped,
        bad_records=bad_records,
        question_types=types,
    )


def scan_shards(
    shards: list[Path], required: tuple[str, ...] = (), workers: int = 1, quiet: bool = False
) -> Iterator[ShardScan]:
    """Yield the `ShardScan` of each shard, in order; `workers` processes read them."""
    scan = partial(scan_shard, required=required)
    if workers <= 1:
        yield from progress(map(scan, shards), "reading shards", len(shards), quiet)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from progress(pool.map(scan, shards), "reading shards", len(shards), quiet)


def type_codes_of(types: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and codes; none for a foreign set whose `type` has too many values to be a response type."""
    names = sorted(set(types))
    if len(names) > MOST_TYPES:
        return ("",), np.zeros(len(types), np.uint8)
    code = {name: i for i, name in enumerate(names)}
    return tuple(names), np.array([code[kind] for kind in types], np.uint8)


def list_shards(folder: Path) -> list[Path]:
    """The `.tar` files of a folder, sorted by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for path in files:
        if path.name.endswith(_COMPRESSED_TARS):
            raise DataError(f"{path} is compressed; decompress it to a plain .tar first.")
    return [path for path in files if path.name.endswith(".tar")]


def local_folder(root: str | Path) -> Path:
    """Return `root` as the path of an existing local folder, or raise DataError."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(root)):
        raise DataError(f"'{root}' is not a local folder: shards are never read from commands or URLs; copy them here.")
    folder = Path(root).expanduser()
    if folder.is_file():
        raise DataError(f"{folder} is a file; give the folder that holds the .tar files.")
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise DataError(f"there is no folder {folder}.{nearest(folder.name, siblings)}")
    return folder


def _read(fd: int, member: TarMember, path: Path) -> bytes:
    data = os.pread(fd, member.size, member.offset)
    if len(data) != member.size:
        fail(path, member.offset, f"member {member.name!r} could not be read completely")
    return data


def _close(
    sample: dict[str, bytes],
    key: str,
    required: tuple[str, ...],
    path: Path,
    at: int,
    bad_records: dict[str, str],
    types: Counter[str],
) -> tuple[list[tuple[int, int]], int, str]:
    """Check a complete sample and return the sizes of its pictures, its text length and its response type.

    Without a picture there is one size, 0, 0. A record that cannot be used counts as empty, because the reader will
    replace and count the sample.
    """
    for names in required:
        if not any(name in sample for name in names.split("|")):
            has = ", ".join(f".{name}" for name in sample)
            fail(path, at, f"sample {key!r} has no .{names.replace('|', ' or .')} (it has {has})")
    sizes = [_image_size(sample[name]) for name in pictures_among(sample)] or [(0, 0)]
    record: dict[str, Any] = {}
    try:
        record = parse_record(sample)
    except SampleError as error:
        bad_records[key] = str(error)
    types.update(question_types(record))
    return sizes, sum(map(len, record_texts(record))), record_type(record)


def _image_size(data: bytes) -> tuple[int, int]:
    """Width and height, upright; 0, 0 for an unreadable image, which the reader will replace and count."""
    try:
        width, height = size_in(data)
    except Exception:  # Pillow's parsers raise nearly anything on broken bytes
        return 0, 0
    return min(width, _INT32), min(height, _INT32)
