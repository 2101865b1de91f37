"""The index of a folder of shards: random access by sample number, verified by checksums."""

import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from mmlab.config.errors import DataError
from mmlab.data.formats import EXTENSIONS
from mmlab.data.index_arrays import check_arrays, picture_counts, read_arrays, write_arrays
from mmlab.data.sample_types import SampleError
from mmlab.data.scan import ScanNotes, ShardScan, list_shards, local_folder, scan_shards, type_codes_of
from mmlab.runs.disk import to_json
from mmlab.runs.index_files import index_files

_VERSION = 1
_ARRAYS = ("shard_sizes", "samples_per_shard", "image_sizes", "text_lengths", "type_codes")
_OPEN_FILES = 64
_BUILD = "build it with `mmlab shards index"


@dataclass(frozen=True)
class Members:
    """Positions of the members of all samples. M members; sample i owns members `first[i]:first[i + 1]`."""

    first: np.ndarray  # int64 [N + 1]
    extension: np.ndarray  # uint8 [M], an index into `formats.EXTENSIONS`
    offset: np.ndarray  # int64 [M], first byte of the data in its shard
    length: np.ndarray  # int64 [M]
    crc: np.ndarray  # uint32 [M]


@dataclass(frozen=True)
class ShardIndex:
    """An open folder of shards. N samples in S shards; samples of one shard are adjacent, in tar order.

    Only its folder and hash are pickled; worker processes of any start method open it again.
    """

    root: Path
    shards: tuple[str, ...]  # file names, sorted
    shard_sizes: np.ndarray = field(repr=False)  # int64 [S], bytes of each file
    samples_per_shard: np.ndarray = field(repr=False)  # int64 [S]
    keys: np.ndarray = field(repr=False)  # '<U' [N]
    image_sizes: np.ndarray = field(repr=False)  # int32 [N, 2]: of first pictures, upright; 0, 0: none, or unreadable
    further_sizes: np.ndarray = field(repr=False)  # int32 [F, 2]: of all further pictures, sample by sample
    text_lengths: np.ndarray = field(repr=False)  # int32 [N]: characters of all texts of the record
    type_codes: np.ndarray = field(repr=False)  # uint8 [N], an index into `type_names`
    type_names: tuple[str, ...]  # response types that occur; empty for samples without one
    members: Members = field(repr=False)
    hash: str  # sha256 over shard names, keys, offsets, sizes and checksums
    notes: ScanNotes = field(repr=False, compare=False)
    _files: dict[int, "_OpenFile"] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self):
        return _reopen, (self.root, self.hash)

    @classmethod
    def open(cls, root: str | Path) -> "ShardIndex":
        """Load the index of a folder and check that it still fits the shards.

        Raises:
            DataError: no folder, no index, one of another version, or shards that were added, removed or
                resized.
        """
        folder = local_folder(root)
        faults: list[DataError] = []
        for path in index_files(folder):
            try:
                if path.is_file():
                    return cls._read(folder, path)
            except DataError as error:
                faults.append(error)
        raise faults[0] if faults else DataError(f"{folder} has no index; {_BUILD} {folder}`.")

    @classmethod
    def _read(cls, folder: Path, path: Path) -> "ShardIndex":
        try:
            arrays = read_arrays(path)
            if int(arrays.pop("version")) != _VERSION:
                raise ValueError("another version")
            index = cls(
                root=folder,
                shards=tuple(arrays.pop("shards").tolist()),
                type_names=tuple(arrays.pop("type_names").tolist()),
                keys=np.char.decode(arrays.pop("keys"), "utf-8"),
                hash=str(arrays.pop("hash")),
                notes=ScanNotes(**json.loads(str(arrays.pop("notes", "{}")))),
                members=Members(**{name: arrays.pop(name) for name in Members.__dataclass_fields__}),
                further_sizes=arrays.pop("further_sizes", np.zeros((0, 2), np.int32)),
                **{name: arrays.pop(name) for name in _ARRAYS},
            )
            check_arrays(index)
        except DataError as error:
            raise DataError(f"{str(error).rstrip('.')}; {_BUILD} {folder}`.") from None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{path} cannot be read ({error}); {_BUILD} {folder}`.") from None
        index._check_fresh()
        return index

    def read(self, i: int, only: Collection[str] | None = None) -> dict[str, bytes]:
        """Read the members of sample `i`.

        Args:
            i: number of the sample, 0 <= i < N.
            only: extensions to read; None reads all.

        Returns:
            Lower-case extension → bytes.

        Raises:
            IndexError: there is no sample `i`.
            SampleError: `checksum` for bytes that changed since the index was built.
            DataError: the shard cannot be opened or read.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = self.shard_of(i)
        file = self._open_file(shard)
        sample = {}
        for m in range(self.members.first[i], self.members.first[i + 1]):
            extension = EXTENSIONS[self.members.extension[m]]
            if only is not None and extension not in only:
                continue
            length = int(self.members.length[m])
            where = f"{self.root / self.shards[shard]}: {self.keys[i]}.{extension}"
            try:
                data = os.pread(file.fd, length, int(self.members.offset[m]))
            except OSError as error:
                raise DataError(f"{where} cannot be read: {error.strerror}.") from None
            if len(data) != length or zlib.crc32(data) != self.members.crc[m]:
                raise SampleError("checksum", f"{where} has changed since the index was built.")
            sample[extension] = data
        return sample

    def shard_of(self, i: int) -> int:
        """The number of the shard that holds sample `i`."""
        return int(np.searchsorted(self._ends, i, side="right"))

    def type_of(self, i: int) -> str:
        """The response type of sample `i`, or an empty string."""
        return self.type_names[self.type_codes[i]]

    def extensions(self, i: int) -> list[str]:
        """The member extensions of sample `i`, without reading it."""
        return [EXTENSIONS[e] for e in self.members.extension[self.members.first[i] : self.members.first[i + 1]]]

    @cached_property
    def pictures(self) -> np.ndarray:
        """int64 `[N]`: number of pictures of each sample."""
        return picture_counts(self.members.first, self.members.extension)

    @property
    def sizes(self) -> np.ndarray:
        """int32 `[K, 2]`: width and height of every picture that can be read, in any order."""
        sizes = np.concatenate([self.image_sizes, self.further_sizes])
        return sizes[sizes[:, 0] > 0]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.samples_per_shard)

    def _open_file(self, shard: int) -> "_OpenFile":
        # pread carries its own offset, so a descriptor may be shared with forked workers and among threads.
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = _OpenFile(self.root / self.shards[shard])
            while len(self._files) > _OPEN_FILES:
                self._files.pop(next(iter(self._files)), None)
        return file

    def _check_fresh(self) -> None:
        names = [path.name for path in list_shards(self.root)]
        for name in sorted(set(names) ^ set(self.shards)):
            state = "was added" if name in names else "was removed"
            raise DataError(f"shard {name} of {self.root} {state} since the index was built; {_BUILD} {self.root}`.")
        for name, size in zip(self.shards, self.shard_sizes, strict=True):
            now = (self.root / name).stat().st_size
            if now != size:
                state = f"has {now} bytes, but had {size} when the index was built"
                raise DataError(f"shard {self.root / name} {state}; {_BUILD} {self.root}`.")


class _OpenFile:
    """A descriptor that closes with its last user, so that no reader loses it when the shard is dropped."""

    def __init__(self, path: Path):
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"shard {path} cannot be opened: {error.strerror}.") from None

    def __del__(self):
        if self.fd >= 0:
            os.close(self.fd)


def build_index(
    root: str | Path, required: Iterable[str] = (), workers: int = 1, quiet: bool = False, elsewhere: bool = True
) -> ShardIndex:
    """Read and verify every shard of a folder, and write its index atomically.

    Args:
        root: a folder of `.tar` files, ours or foreign; other files are ignored.
        required: members that each sample must have; `jpg|png` requires one of them.
        workers: processes that read shards in parallel.
        quiet: show no progress.
        elsewhere: write the index of a read-only folder into the user's cache, where `ShardIndex.open` finds it.

    Raises:
        RunError: the index cannot be written.
        DataError: no shard, whatever `scan_shard` raises, or a key in two shards.
    """
    folder = local_folder(root)
    shards = list_shards(folder)
    if not shards:
        raise DataError(f"{folder} holds no .tar files.")
    index = _merge(folder, shards, scan_shards(shards, tuple(required), workers, quiet))
    write_arrays(folder, _arrays(index), elsewhere)
    return index


def _reopen(root: Path, content_hash: str) -> ShardIndex:
    index = ShardIndex.open(root)
    if index.hash != content_hash:
        raise DataError(f"the index of {root} was rebuilt with different contents while it was in use.")
    return index


def _merge(folder: Path, shards: list[Path], scans: Iterable[ShardScan]) -> ShardIndex:
    """Join the scans of all shards into one index; raises DataError for a key in two of them."""
    owner: dict[str, str] = {}
    parts: list[ShardScan] = []
    for path, scan in zip(shards, scans, strict=True):
        for key in scan.keys:
            if key in owner:
                raise DataError(f"key '{key}' is in two shards of {folder}: {owner[key]} and {path.name}.")
            owner[key] = path.name
        parts.append(scan)
    notes = ScanNotes.of(parts)
    if not owner:
        raise DataError(f"the shards of {folder} hold no samples{notes.instead()}.")
    lengths = np.concatenate([np.diff(part.first) for part in parts])
    members = Members(
        first=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        extension=np.concatenate([part.extension for part in parts]),
        offset=np.concatenate([part.offset for part in parts]),
        length=np.concatenate([part.length for part in parts]),
        crc=np.concatenate([part.crc for part in parts]),
    )
    names = tuple(path.name for path in shards)
    type_names, type_codes = type_codes_of([kind for part in parts for kind in part.types])
    samples_per_shard = np.array([len(part.keys) for part in parts], np.int64)
    return ShardIndex(
        root=folder,
        shards=names,
        shard_sizes=np.array([part.size for part in parts], np.int64),
        samples_per_shard=samples_per_shard,
        keys=np.array(list(owner)),
        image_sizes=np.concatenate([part.image_sizes for part in parts]),
        further_sizes=np.concatenate([part.further_sizes for part in parts]),
        text_lengths=np.concatenate([part.text_lengths for part in parts]),
        type_codes=type_codes,
        type_names=type_names,
        members=members,
        hash=_content_hash(names, samples_per_shard, list(owner), members),
        notes=notes,
    )


def _content_hash(shards: Iterable[str], samples_per_shard: np.ndarray, keys: list[str], members: Members) -> str:
    digest = hashlib.sha256()
    digest.update("\n".join([*shards, "", *keys]).encode(errors="surrogateescape"))
    for array in (samples_per_shard, *vars(members).values()):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _arrays(index: ShardIndex) -> dict[str, np.ndarray]:
    """What an index is written as; sizes of further pictures only where there are any, as indexes always were."""
    further = {"further_sizes": index.further_sizes} if len(index.further_sizes) else {}
    return {
        "version": np.array(_VERSION),
        "hash": np.array(index.hash),
        "shards": np.array(index.shards),
        "type_names": np.array(index.type_names),
        "keys": np.char.encode(index.keys, "utf-8"),
        "notes": np.array(to_json(index.notes.as_json())),
        **{name: getattr(index, name) for name in _ARRAYS},
        **vars(index.members),
        **further,
    }
