"""The manifest of a set of shards: one line per shard, from which the global order of all samples follows."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mmlab.data.scan_notes import MOST_TYPES, ScanNotes
from mmlab.runs.disk import to_json

_VERSION = 2
_MOST = 1 << 60  # of bytes or samples


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
    """All shards of a set, sorted by name. S shards.

    Attributes:
        entries: one of each shard.
        notes: on all of them.
        required: members that each sample was required to have.
    """

    entries: Sequence[Entry] = field(repr=False)
    notes: ScanNotes = field(repr=False)
    required: tuple[str, ...] = ()

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
        stated = {"version": _VERSION, "hash": self.hash, "required": self.required, "notes": asdict(self.notes)}
        about = to_json(stated)
        return f'{about[:-1]}, "shards": [\n{lines}\n]}}\n'

    @classmethod
    def of(cls, text: str | bytes) -> "Manifest":
        """Parse what `to_json` returns.

        Raises:
            one of `MALFORMED`: it is something else, or was changed.
        """
        content: dict[str, Any] = json.loads(text)
        if content["version"] != _VERSION:
            raise ValueError("another version")
        entries = [Entry(**entry) for entry in content["shards"]]
        for entry in entries:
            _check(entry)
        names = [entry.name for entry in entries]
        if names != sorted(set(names)):
            raise ValueError("its shards are not sorted")
        manifest = cls(entries, ScanNotes.from_json(content["notes"]), tuple(map(str, content["required"])))
        samples = sum(entry.samples for entry in entries)
        if not 0 < samples <= _MOST or manifest.hash != content["hash"]:
            raise ValueError("its shards do not fit its hash")
        return manifest


def _check(entry: Entry) -> None:
    """Raise ValueError for values that no shard has, such as a name that leads to another folder."""
    texts = (entry.name, entry.hash, entry.table, entry.etag or "", *(entry.types or {}))
    numbers = (entry.bytes, entry.samples, entry.table_bytes, *(entry.types or {}).values())
    if not all(isinstance(one, str) for one in texts) or any(type(one) is not int for one in numbers):
        raise ValueError("a shard has values of other types")
    if not all(0 <= one <= _MOST for one in numbers):
        raise ValueError(f"shard {entry.name!r} has a size that is none")
    if not entry.name.endswith(".tar") or entry.name.startswith(".") or "/" in entry.name or "\0" in entry.name:
        raise ValueError(f"{entry.name!r} is no name of a shard")
