"""The samples of a tar without an index: found by walking over its headers, read when they are used."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mmlab.config.errors import DataError
from mmlab.config.locations import Location
from mmlab.data.formats import foreign_kind, split_name
from mmlab.data.local_files import OpenFile
from mmlab.data.sample_types import SampleError
from mmlab.data.tar import TarMember, walk


@dataclass(frozen=True)
class OpenTar:
    """An open shard.

    Attributes:
        place: its path or address.
        path: the local file.
    """

    place: Location
    path: Path
    _file: OpenFile = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_file", OpenFile(self.path))

    @cached_property
    def hash(self) -> str:
        """Stands for the shard in caches: keys are unique within a shard only."""
        return hashlib.sha256(str(self.place).encode(errors="surrogateescape")).hexdigest()

    def samples(self) -> Iterator["StoredSample"]:
        """Yield its samples in order, by reading headers alone.

        A sample whose key occurred before in the shard, or with two members of one extension, has a `fault`.

        Raises:
            DataError: truncated or otherwise damaged, see `walk`.
        """
        keys: set[str] = set()
        sample: StoredSample | None = None
        for member in walk(self._file.fd, self.place):
            parts = split_name(member.name)
            if parts is None or foreign_kind(member.name) is not None:
                continue
            key, extension = parts
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = StoredSample(key, self, {})
                if key in keys:
                    why = f"{self.place}: the members of {key!r} are not adjacent, or the key is used twice"
                    sample.fault = SampleError("key", why)
                keys.add(key)
            if extension in sample.members:
                sample.fault = SampleError("member", f"{self.place}: {key!r} has the member .{extension} twice")
            sample.members[extension] = member
        if sample is not None:
            yield sample

    def foreign(self) -> Counter[str]:
        """Its members that are not read: extension or other name → number."""
        kinds = Counter[str]()
        for member in walk(self._file.fd, self.place):
            if (kind := foreign_kind(member.name)) is not None:
                kinds[kind if kind.isprintable() else repr(kind)] += 1
        return kinds

    def read(self, member: TarMember) -> bytes:
        """The bytes of a member; raises DataError if the shard has become shorter or cannot be read."""
        try:
            data = os.pread(self._file.fd, member.size, member.offset)
        except OSError as error:
            raise DataError(f"{self.place} cannot be read: {error.strerror}.") from None
        if len(data) != member.size:
            raise DataError(f"{self.place}, byte {member.offset}: {member.name!r} could not be read completely.")
        return data


@dataclass(slots=True)
class StoredSample:
    """A sample that is found, and not read yet.

    Attributes:
        key: its key, unique in the shard unless there is a `fault`.
        shard: keeps the file open.
        members: extension → place in the shard.
        fault: why it cannot be used, if that is known from its headers.
    """

    key: str
    shard: OpenTar
    members: dict[str, TarMember]
    fault: SampleError | None = None

    def read(self, only: Collection[str]) -> dict[str, bytes]:
        """The bytes of those members in `only` that there are.

        Raises:
            SampleError: the `fault`.
            DataError: see `OpenTar.read`.
        """
        if self.fault is not None:
            raise self.fault
        return {name: self.shard.read(member) for name, member in self.members.items() if name in only}
