"""Validation shards without an index, found by one walk over their headers."""

from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mmlab.config.errors import ConfigError, DataError
from mmlab.config.locations import Location
from mmlab.data.config import ShardsConfig, SourceConfig
from mmlab.data.mixture import Source, open_sources
from mmlab.data.sample_types import SampleError
from mmlab.data.scan_notes import ScanNotes
from mmlab.data.tar import TarMember
from mmlab.data.tar_samples import OpenTar
from mmlab.runs.shard_patterns import lacks_index, named_shards, set_name

_OPEN_FILES = 64


class WalkedShards:
    """What a pass in order needs of a `ShardIndex`; keys begin with the shard, since those of several may be equal.

    Args:
        shards: local tars.

    Raises:
        DataError: a damaged shard, or no samples.
    """

    def __init__(self, shards: Sequence[Path]):
        self.root, self.shards = shards[0].parent, list(shards)
        self._open: dict[int, OpenTar] = {}
        self._places: list[int] = []  # number of each sample's shard
        self._members: list[dict[str, TarMember]] = []
        self._faults: dict[int, SampleError] = {}
        self.keys: list[str] = []
        repeated = len({shard.name for shard in shards}) < len(shards)
        for number, shard in enumerate(shards):
            for sample in OpenTar(shard, shard).samples():
                if sample.fault is not None:
                    self._faults[len(self.keys)] = sample.fault
                self._places.append(number)
                self._members.append(sample.members)
                self.keys.append(f"{shard if repeated else shard.name}/{sample.key}")
        if not self.keys:
            instead = ScanNotes.of(OpenTar(shards[0], shards[0]).foreign(), {}, Counter()).instead()
            raise DataError(f"the shards in {self.root} hold no samples{instead}.")

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    @cached_property
    def samples_per_shard(self) -> np.ndarray:
        """int64 `[S]`."""
        return np.bincount(self._places, minlength=len(self.shards)).astype(np.int64)

    @cached_property
    def hash(self) -> str:
        """sha256 over keys and sizes of members."""
        digest = sha256()
        for key, members in zip(self.keys, self._members, strict=True):
            sizes = " ".join(f"{name} {member.size}" for name, member in members.items())
            digest.update(f"{key}\0{sizes}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def type_of(self, i: int) -> str:
        """An empty text: no record was read."""
        return ""

    def extensions(self, i: int) -> tuple[str, ...]:
        """Of the members of sample `i`."""
        return tuple(self._members[i])

    def read(self, i: int, only: Collection[str] | None = None) -> dict[str, bytes]:
        """Read the members of sample `i`, as `ShardIndex.read` does; raises SampleError if its headers are at fault."""
        if i in self._faults:
            raise self._faults[i]
        number = self._places[i]
        if number not in self._open:
            self._open[number] = OpenTar(self.shards[number], self.shards[number])
            while len(self._open) > _OPEN_FILES:
                self._open.pop(next(iter(self._open)))
        members = self._members[i]
        return {name: self._open[number].read(members[name]) for name in members if only is None or name in only}


def open_or_walk(config: ShardsConfig, listed: Sequence[SourceConfig]) -> list[Source]:
    """Open the indexes of sources; those without one are walked over.

    Raises:
        ConfigError, DataError: see `open_sources`, `named_shards` and `WalkedShards`; or an address without an index.
    """
    sources: list[Source] = []
    for source in listed:
        if lacks_index(source.path, config.root):
            shards = named_shards(source.path, config.root)
            sources.append(Source(source.name or set_name(shards), _walked(shards), caption=source.caption))
        else:
            sources += open_sources(config, [source])
    name, number = Counter(source.name for source in sources).most_common(1)[0]
    if number > 1:
        raise ConfigError(f"two sources are named '{name}'; give each its own `name`.")
    return sources


def _walked(shards: Sequence[Location]) -> Any:
    local = [shard for shard in shards if isinstance(shard, Path)]
    if len(local) < len(shards):
        raise ConfigError(f"validation shards at an address need an index: `mmlab shards index {shards[0].parent}`.")
    return WalkedShards(local)
