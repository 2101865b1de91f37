"""The index of one shard: a file of arrays that is mapped, not read, so that it takes no memory of a process.

It is a safetensors file. A table has N samples and M members, samples in tar order.
"""

import hashlib
import json
import math
import mmap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmlab.config.errors import DataError
from mmlab.data.formats import EXTENSIONS, PICTURES
from mmlab.runs.disk import replacing, to_json

_VERSION = 2
_ABOUT = "about"
_LONGEST_HEADER = 1 << 20
_DTYPES = {
    "key_bytes": np.uint8,
    "key_ends": np.int64,
    "key_hashes": np.uint64,
    "first": np.int64,
    "extension": np.uint8,
    "offset": np.int64,
    "length": np.int64,
    "crc": np.uint32,
    "image_sizes": np.int32,
    "further_sizes": np.int32,
    "text_lengths": np.int32,
    "type_codes": np.uint8,
}
_NAMES = {np.uint8: "U8", np.uint32: "U32", np.uint64: "U64", np.int32: "I32", np.int64: "I64"}  # of safetensors
_IDENTITY = ("key_bytes", "key_ends", "first", "extension", "offset", "length", "crc")
MOST_TYPES = 256
"""Response types of a set; more of them are some other field."""
_NAMED = 20  # kinds of members that are not read, and bad records, that an index names


@dataclass(frozen=True)
class ScanNotes:
    """What was found in shards beside samples that can be used.

    Attributes:
        skipped: members that are not read, such as `.url` or `._*` → their number; the most common ones, and `other`.
        bad_records: number of records that cannot be used; the reader replaces their samples.
        examples: keys of some of them → what is wrong.
        question_types: type → how many `questions` of records have it; None for sets with too many types.
    """

    skipped: dict[str, int] = field(default_factory=dict)
    bad_records: int = 0
    examples: dict[str, str] = field(default_factory=dict)
    question_types: dict[str, int] | None = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One line for each of them that there is."""
        skipped = ", ".join(f"{name} {number:,}" for name, number in self.skipped.items())
        examples = "; ".join(f"{key!r}: {message}" for key, message in list(self.examples.items())[:3])
        records = f"{self.bad_records:,} records cannot be used, such as {examples.rstrip('.')}"
        return [f"members that are not read: {skipped}"] * bool(skipped) + [records] * bool(self.bad_records)

    @classmethod
    def of(cls, skipped: Counter[str], bad_records: dict[str, str], types: Counter[str]) -> "ScanNotes":
        """The notes on one shard: numbers of members, key → what is wrong with its record, numbers of questions."""
        return cls(dict(skipped), len(bad_records), bad_records, dict(types)).joined()

    def joined(self, *others: "ScanNotes") -> "ScanNotes":
        """These notes and others as one."""
        skipped, types, examples, number, too_many = Counter[str](), Counter[str](), dict[str, str](), 0, False
        for one in (self, *others):
            skipped += Counter(one.skipped)
            number += one.bad_records
            too_many |= one.question_types is None
            types += Counter(one.question_types or {})
            examples |= dict(list(one.examples.items())[: max(_NAMED - len(examples), 0)])
        other = skipped.pop("other", 0)
        common = dict(skipped.most_common(_NAMED))
        if other := other + skipped.total() - sum(common.values()):
            common["other"] = other
        named = None if too_many or len(types) > MOST_TYPES else dict(sorted(types.items()))
        return ScanNotes(common, number, examples, named)

    def instead(self) -> str:
        """For the message that there are no samples: what there is instead, and what would be a sample."""
        if not self.skipped:
            return ""
        there = ", ".join(f"{name} ({number:,})" for name, number in self.skipped.items())
        return f", only {there}; a member is named 'key.jpg': its extension begins at the first dot of its file name"


@dataclass(frozen=True)
class About:
    """What is stated of a shard beside its arrays.

    Attributes:
        size: bytes of the shard.
        etag: of the object that was read; None for a local file.
        required: members that each sample was required to have.
        type_names: response types that occur, an empty text for samples without one; none for too many types.
        hash: sha256 over keys, offsets, sizes and checksums.
        notes: what was found beside samples that can be used.
    """

    size: int
    etag: str | None
    required: tuple[str, ...]
    type_names: tuple[str, ...]
    hash: str
    notes: ScanNotes


@dataclass(frozen=True)
class ShardTable:
    """The open index of one shard; sample j owns members `first[j]:first[j + 1]`."""

    about: About
    key_bytes: np.ndarray = field(repr=False)  # uint8 [B], the keys as UTF-8, one after the other
    key_ends: np.ndarray = field(repr=False)  # int64 [N]
    key_hashes: np.ndarray = field(repr=False)  # uint64 [N], see `key_hash`
    first: np.ndarray = field(repr=False)  # int64 [N + 1]
    extension: np.ndarray = field(repr=False)  # uint8 [M], an index into `formats.EXTENSIONS`
    offset: np.ndarray = field(repr=False)  # int64 [M], first byte of the data in the shard
    length: np.ndarray = field(repr=False)  # int64 [M]
    crc: np.ndarray = field(repr=False)  # uint32 [M]
    image_sizes: np.ndarray = field(repr=False)  # int32 [N, 2]: of first pictures, upright; 0, 0: none, or unreadable
    further_sizes: np.ndarray = field(repr=False)  # int32 [F, 2]: of all further pictures, sample by sample
    text_lengths: np.ndarray = field(repr=False)  # int32 [N]: characters of all texts of the record
    type_codes: np.ndarray = field(repr=False)  # uint8 [N], an index into `about.type_names`

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, j: int) -> str:
        """The key of sample j."""
        start = int(self.key_ends[j - 1]) if j else 0
        return self.key_bytes[start : int(self.key_ends[j])].tobytes().decode()

    def keys(self) -> list[str]:
        """All keys."""
        return [self.key(j) for j in range(len(self))]

    def find(self, key: str) -> int | None:
        """The number of the sample with this key, or None."""
        places = np.flatnonzero(self.key_hashes == key_hash(key)).tolist()
        return next((j for j in places if self.key(j) == key), None)

    def members(self, j: int) -> list[tuple[str, int, int, int]]:
        """(extension, offset, length, CRC-32) of each member of sample j.

        Raises:
            ValueError: the table is damaged.
        """
        low, high = self.first[j : j + 2].tolist()
        if not 0 <= low <= high <= len(self.extension):
            raise ValueError(f"sample {j} has members {low} to {high}")
        columns = (one[low:high].tolist() for one in (self.extension, self.offset, self.length, self.crc))
        found = []
        for code, offset, length, crc in zip(*columns, strict=True):
            if code >= len(EXTENSIONS) or offset < 0 or not 0 <= length <= self.about.size - offset:
                raise ValueError(f"sample {j} has a member outside of its shard")
            found.append((EXTENSIONS[code], offset, length, crc))
        return found

    @cached_property
    def pictures(self) -> np.ndarray:
        """int64 `[N]`: number of pictures of each sample, as `pictures_among` returns them."""
        stems = list(dict.fromkeys(name.rpartition(".")[0] for name in PICTURES))
        number = [stems.index(name.rpartition(".")[0]) if name in PICTURES else -1 for name in EXTENSIONS]
        numbers = np.array(number)[self.extension]
        samples = np.repeat(np.arange(len(self)), np.diff(self.first))
        shown = np.unique((samples * len(stems) + numbers)[numbers >= 0])  # of several kinds, one counts
        return np.bincount(shown // len(stems), minlength=len(self))

    def type_counts(self) -> dict[str, int] | None:
        """Response type → samples; None for a shard with more types than a set may have."""
        names = self.about.type_names
        counts = np.bincount(self.type_codes, minlength=len(names)).tolist()
        return dict(zip(names, counts, strict=True)) if names or not len(self) else None

    def check(self) -> None:
        """Check all values; what is read while training is checked sample by sample.

        Raises:
            ValueError: they do not fit each other.
        """
        m, ends = len(self.extension), np.concatenate([[0], self.key_ends])
        fit = self.first[0] == 0 and self.first[-1] == m and (np.diff(self.first) >= 0).all()
        fit = fit and (np.diff(ends) >= 0).all() and ends[-1] == len(self.key_bytes)
        fit = fit and (not m or self.extension.max() < len(EXTENSIONS))
        fit = fit and (not len(self) or self.type_codes.max() < max(len(self.about.type_names), 1))
        if not fit:
            raise ValueError("its arrays do not fit each other")
        if len(self.further_sizes) != int((self.pictures.clip(1) - 1).sum()):
            raise ValueError("it lacks the sizes of further pictures")
        if (self.offset < 0).any() or (self.length < 0).any() or (self.offset > self.about.size - self.length).any():
            raise ValueError("it names places outside its shard")


def key_hash(key: str) -> int:
    """64 bits of a key, by which equal keys of different shards are found without holding all keys."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def content_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """The hash of a shard: sha256 over keys, offsets, sizes and checksums of all members."""
    digest = hashlib.sha256()
    for name in _IDENTITY:
        digest.update(np.ascontiguousarray(arrays[name], _DTYPES[name]).tobytes())
    return digest.hexdigest()


def write_table(path: Path, table: ShardTable) -> None:
    """Write the index of one shard atomically; equal tables give equal bytes.

    Raises:
        RunError: the disk does not allow it.
    """
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(getattr(table, name), dtype) for name, dtype in _DTYPES.items()}
    about = {_ABOUT: to_json({"version": _VERSION, **asdict(table.about)}, sort_keys=True)}
    with replacing(path, sync=False) as draft:
        save_file(arrays, draft, about)


def open_table(path: Path) -> ShardTable:
    """Map the index of one shard; only the shapes of its arrays are checked.

    Raises:
        DataError: no such file as `write_table` writes.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(data[:8], "little")
        if not 8 < start <= min(len(data), _LONGEST_HEADER):
            raise ValueError("no header")
        header = json.loads(data[8:start])
        stated = json.loads(header["__metadata__"][_ABOUT])
        if stated.pop("version") != _VERSION:
            raise ValueError("another version")
        about = About(**{**stated, "notes": ScanNotes(**stated["notes"])})
        about = replace(about, required=tuple(about.required), type_names=tuple(about.type_names))
        table = ShardTable(about, **{name: _view(data, start, header[name], name) for name in _DTYPES})
        n, m = len(table.key_ends), len(table.extension)
        shapes = {"key_hashes": (n,), "first": (n + 1,), "image_sizes": (n, 2), "text_lengths": (n,)}
        shapes |= {"type_codes": (n,), "offset": (m,), "length": (m,), "crc": (m,)}
        if any(getattr(table, name).shape != shape for name, shape in shapes.items()):
            raise ValueError("its arrays do not fit each other")
        return table
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path} cannot be read ({' '.join(str(reason).split())[:200]}).") from None


def _view(data: mmap.mmap, start: int, stated: dict[str, Any], name: str) -> np.ndarray:
    """One array of a mapped file, whose stated shape is compared with its bytes."""
    dtype, shape, (low, high) = np.dtype(_DTYPES[name]), stated["shape"], stated["data_offsets"]
    size = math.prod(shape) * dtype.itemsize
    if stated["dtype"] != _NAMES[dtype.type] or not 0 <= low <= high <= len(data) - start or high - low != size:
        raise ValueError(f"{name} does not fit into its {high - low} bytes")
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} has a negative size")
    return np.frombuffer(data, dtype, math.prod(shape), start + low).reshape(shape)


def joined(tables: Iterable[ShardTable], name: str) -> np.ndarray:
    """One array of several shards, one after the other."""
    parts = [getattr(table, name) for table in tables]
    return np.concatenate(parts) if parts else np.zeros(0, _DTYPES.get(name, np.int64))
