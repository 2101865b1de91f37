"""The manifest of a set of shards: one line per shard, from which the global order of all samples follows."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mmlab.data.shard_table import MOST_TYPES, ScanNotes
from mmlab.runs.disk import to_json

_VERSION = 2


@dataclass(frozen=True)
class Entry:
    """One shard.

    Attributes:
        name: of its file.
        bytes: of its file.
        samples: how many it holds.
        hash: sha256 of its contents, see `About`.
        table: sha256 of the file of its table.
        table_bytes: of that file.
        etag: of the object that was indexed; None for a local file.
        types: response type → samples; None for too many types.
    """

    name: str
    bytes: int
    samples: int
    hash: str
    table: str
    table_bytes: int
    etag: str | None
    types: dict[str, int] | None

    @property
    def table_name(self) -> str:
        """The file of its table, in the folder of the index."""
        return table_name(self.name)


def table_name(shard: str) -> str:
    """The file of a shard's table, in the folder of the index."""
    return f"{shard.removesuffix('.tar')}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """All shards of a set, sorted by name. S shards."""

    entries: Sequence[Entry] = field(repr=False)
    notes: ScanNotes = field(repr=False)

    @cached_property
    def samples(self) -> np.ndarray:
        """int64 `[S]`: number of samples of each shard."""
        return np.array([entry.samples for entry in self.entries], np.int64)

    @cached_property
    def hash(self) -> str:
        """The hash of the set: sha256 over names, sizes and hashes of the shards."""
        lines = (f"{entry.name}\0{entry.samples}\0{entry.hash}\n" for entry in self.entries)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def type_names(self) -> tuple[str, ...]:
        """Response types that occur; just an empty text for samples without one, or with too many."""
        names = sorted({name for entry in self.entries for name in entry.types or {}})
        few = len(names) <= MOST_TYPES and all(entry.types is not None for entry in self.entries)
        return tuple(names) if few else ("",)

    def to_json(self) -> str:
        """The manifest as a file with a line for each shard."""
        lines = ",\n".join(to_json(asdict(entry)) for entry in self.entries)
        about = to_json({"version": _VERSION, "hash": self.hash, "notes": asdict(self.notes)})
        return f'{about[:-1]}, "shards": [\n{lines}\n]}}\n'

    @classmethod
    def of(cls, text: str | bytes) -> "Manifest":
        """Parse what `to_json` returns.

        Raises:
            ValueError, TypeError, KeyError: it is something else, or was changed.
        """
        content: dict[str, Any] = json.loads(text)
        if content["version"] != _VERSION:
            raise ValueError("another version")
        manifest = cls([Entry(**entry) for entry in content["shards"]], ScanNotes(**content["notes"]))
        samples = manifest.samples
        if manifest.hash != content["hash"] or not samples.sum() or (samples < 0).any():
            raise ValueError("its shards do not fit its hash")
        return manifest
