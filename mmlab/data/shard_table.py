"""The index of one shard: a file of arrays that is mapped, not read, so that it takes no memory of a process.

It is a safetensors file. A table has N samples and M members, samples in tar order.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmlab.config.errors import DataError
from mmlab.config.locations import Location
from mmlab.data.formats import EXTENSIONS, PICTURES
from mmlab.data.scan_notes import ScanNotes
from mmlab.runs.disk import replacing, to_json

_VERSION = 2
_ABOUT = "about"
_LONGEST_HEADER = 1 << 20
_LARGE = 1 << 20  # bytes of a shard
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
_Span = tuple[tuple[int, ...], int, int]
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
"""What parsing a damaged file raises."""
_IDENTITY = ("key_bytes", "key_ends", "first", "extension", "offset", "length", "crc")


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

    @classmethod
    def of(cls, text: str) -> "About":
        """Parse what `write_table` writes.

        Raises:
            ValueError, TypeError, AttributeError: it is something else.
        """
        stated: dict[str, Any] = json.loads(text)
        if stated.pop("version") != _VERSION:
            raise ValueError("another version")
        about = cls(**{**stated, "notes": ScanNotes.from_json(stated["notes"])})
        about = replace(about, required=tuple(about.required), type_names=tuple(about.type_names))
        texts = (about.hash, about.etag or "", *about.required, *about.type_names)
        if type(about.size) is not int or about.size < 0 or not all(isinstance(text, str) for text in texts):
            raise ValueError("it states values of other types")
        return about


@dataclass(frozen=True)
class ShardTable:
    """The open index of one shard; sample j owns members `first[j]:first[j + 1]`.

    A method that meets damaged values raises a DataError, which names the file.
    """

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
    source: tuple[Path, Location] | None = None  # its file, and the set that it belongs to

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, j: int) -> str:
        """The key of sample j."""
        start, end = int(self.key_ends[j - 1]) if j else 0, int(self.key_ends[j])
        if not 0 <= start <= end <= len(self.key_bytes):
            raise self._damaged(f"the key of sample {j} lies outside of its array")
        try:
            return self.key_bytes[start:end].tobytes().decode()
        except UnicodeDecodeError:
            raise self._damaged(f"the key of sample {j} is not UTF-8") from None

    def keys(self) -> list[str]:
        """All keys."""
        return [self.key(j) for j in range(len(self))]

    def find(self, key: str) -> int | None:
        """The number of the sample with this key, or None."""
        places = np.flatnonzero(self.key_hashes == key_hash(key)).tolist()
        return next((j for j in places if self.key(j) == key), None)

    def members(self, j: int) -> list[tuple[str, int, int, int]]:
        """(extension, offset, length, CRC-32) of each member of sample j."""
        low, high = self.first[j : j + 2].tolist()
        if not 0 <= low <= high <= len(self.extension):
            raise self._damaged(f"sample {j} has members {low} to {high}")
        columns = (one[low:high].tolist() for one in (self.extension, self.offset, self.length, self.crc))
        found = []
        for code, offset, length, crc in zip(*columns, strict=True):
            if code >= len(EXTENSIONS) or offset < 0 or not 0 <= length <= self.about.size - offset:
                raise self._damaged(f"sample {j} has a member outside of its shard")
            found.append((EXTENSIONS[code], offset, length, crc))
        return found

    def type_of(self, j: int) -> str:
        """The response type of sample j; an empty text without one, or in a shard with too many."""
        names, code = self.about.type_names, int(self.type_codes[j])
        if code >= max(len(names), 1):
            raise self._damaged(f"sample {j} has type {code} of {len(names)}")
        return names[code] if names else ""

    @cached_property
    def pictures(self) -> np.ndarray:
        """int64 `[N]`: number of pictures of each sample, as `pictures_among` returns them."""
        counts = np.diff(self.first)
        fit = self.first[0] == 0 and self.first[-1] == len(self.extension) and (counts >= 0).all()
        if not fit or (len(self.extension) and self.extension.max() >= len(EXTENSIONS)):
            raise self._damaged("its members do not fit its samples")
        stems = list(dict.fromkeys(name.rpartition(".")[0] for name in PICTURES))
        number = [stems.index(name.rpartition(".")[0]) if name in PICTURES else -1 for name in EXTENSIONS]
        numbers = np.array(number)[self.extension]
        samples = np.repeat(np.arange(len(self)), counts)
        shown = np.unique((samples * len(stems) + numbers)[numbers >= 0])  # of several kinds, one counts
        return np.bincount(shown // len(stems), minlength=len(self))

    def type_counts(self) -> dict[str, int] | None:
        """Response type → samples; None for a shard with more types than a set may have."""
        names = self.about.type_names
        if len(self) and self.type_codes.max() >= max(len(names), 1):
            raise self._damaged("it has types without a name")
        counts = np.bincount(self.type_codes, minlength=len(names)).tolist()
        return dict(zip(names, counts, strict=True)) if names or not len(self) else None

    def check(self) -> None:
        """Check all values; what is read while training is checked sample by sample."""
        ends = np.concatenate([[0], self.key_ends])
        if (np.diff(ends) < 0).any() or ends[-1] != len(self.key_bytes):
            raise self._damaged("its keys do not fit its samples")
        if len(self.further_sizes) != int((self.pictures.clip(1) - 1).sum()):
            raise self._damaged("it lacks the sizes of further pictures")
        if (self.offset < 0).any() or (self.length < 0).any() or (self.offset > self.about.size - self.length).any():
            raise self._damaged("it has members outside of its shard")
        if content_hash({name: getattr(self, name) for name in _IDENTITY}) != self.about.hash:
            raise self._damaged("its arrays do not have the hash that it states")
        self.type_counts()

    def _damaged(self, reason: str) -> DataError:
        path, root = self.source or ("an index", "the set")
        return _unreadable(path, root, reason)


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
    # Waiting for the disk takes longer than making the table of a small shard again.
    with replacing(path, sync=table.about.size > _LARGE) as draft:
        save_file(arrays, draft, about)


def open_table(path: Path, root: Location) -> ShardTable:
    """Map the index of one shard; of its arrays, only the shapes are checked.

    Args:
        path: of its file.
        root: of the set, for the error.

    Raises:
        DataError: no such file as `write_table` writes.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, about, spans = read_header(data, len(data))
        arrays = {}
        for name, (shape, low, _) in spans.items():
            arrays[name] = np.frombuffer(data, _DTYPES[name], math.prod(shape), start + low).reshape(shape)
        return ShardTable(about, **arrays, source=(path, root))
    except OSError as error:
        raise _unreadable(path, root, error.strerror) from None
    except MALFORMED as error:
        raise _unreadable(path, root, error) from None


def header_length(data: bytes | mmap.mmap) -> int:
    """The bytes of a table before its arrays, by its first 8 bytes; raises ValueError if they state none."""
    start = 8 + int.from_bytes(data[:8], "little")
    if not 8 < start <= _LONGEST_HEADER:
        raise ValueError("it has no header")
    return start


def read_header(data: bytes | mmap.mmap, size: int) -> tuple[int, About, dict[str, _Span]]:
    """Parse the header of a table.

    Args:
        data: the file, or at least its header.
        size: bytes of the file.

    Returns:
        Where the arrays start, what is stated, and for each array its shape and its bytes, counted from that start.

    Raises:
        one of `MALFORMED`: it is something else, or does not fit the file.
    """
    start = header_length(data)
    if start > min(len(data), size):
        raise ValueError("its header is cut")
    header = json.loads(data[8:start])
    about = About.of(header.pop("__metadata__")[_ABOUT])
    if header.keys() != _DTYPES.keys():
        raise ValueError("it has other arrays")
    spans = {name: _span(header[name], name) for name in _DTYPES}
    at = 0
    for _, low, high in sorted(spans.values(), key=lambda span: span[1:]):
        if low != at:
            raise ValueError("its arrays overlap, or have gaps")
        at = high
    if at != size - start:
        raise ValueError(f"it has {size - start} bytes of arrays, not {at}")
    n, m, f, b = (spans[name][0][0] for name in ("key_ends", "extension", "further_sizes", "key_bytes"))
    shapes = dict.fromkeys(_DTYPES, (n,)) | dict.fromkeys(("extension", "offset", "length", "crc"), (m,))
    shapes |= {"first": (n + 1,), "key_bytes": (b,), "image_sizes": (n, 2), "further_sizes": (f, 2)}
    if any(spans[name][0] != shape for name, shape in shapes.items()):
        raise ValueError("its arrays do not fit each other")
    return start, about, spans


def _span(stated: dict[str, Any], name: str) -> _Span:
    """Shape, first and last byte of an array; the shape must fit the bytes."""
    dtype, shape, (low, high) = np.dtype(_DTYPES[name]), tuple(stated["shape"]), stated["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (low, high, *shape)) or not shape:
        raise ValueError(f"{name} has a size that is none")
    if stated["dtype"] != _NAMES[dtype.type] or high - low != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} does not fit into its {high - low} bytes")
    return shape, low, high


def _unreadable(path: Path | str, root: Location | str, reason: object) -> DataError:
    text = " ".join(str(reason).split())[:200]
    return DataError(f"{path} cannot be read ({text}); rebuild it with `mmlab shards index {root}`.")


def joined(tables: Iterable[ShardTable], name: str) -> np.ndarray:
    """One array of several shards, one after the other."""
    parts = [getattr(table, name) for table in tables]
    return np.concatenate(parts) if parts else np.zeros(0, _DTYPES.get(name, np.int64))
