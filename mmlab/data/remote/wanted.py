"""What clients of the shard cache ask for: objects of remote sets."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from mmlab.config.errors import DataError


@dataclass(frozen=True)
class Wanted:
    """An object of a set, and what its copy is compared with.

    Args:
        set: address of the set.
        name: of the object, below the address.
        size: its bytes.
        etag: of the object that was indexed; None: not compared.
        sha256: of its bytes; empty: not compared.
        hash: of its contents, for shards; an object with other contents is another file of the cache.
        table: of a shard: its index, with the checksums of its members; a text is the path of a local file.

    Raises:
        DataError: a name that leads out of the set.
    """

    set: str
    name: str
    size: int
    etag: str | None = None
    sha256: str = ""
    hash: str = ""
    table: "Wanted | str | None" = None

    def __post_init__(self) -> None:
        if self.name.startswith("/") or {"", ".", ".."} & set(self.name.split("/")) or "\0" in self.name:
            raise DataError(f"'{self.name}' cannot be the name of an object of {self.set}.")

    @cached_property
    def path(self) -> str:
        """Of its copy, relative to the cache folder; it differs for objects with other contents."""
        name = PurePosixPath(self.name)
        identity = self.hash or self.sha256 or self.etag or ""
        label = re.sub(r"[^\w.-]", "_", re.split("[?#]", self.set.rstrip("/"))[0].rpartition("/")[2], flags=re.ASCII)
        folder = f"{label[:60]}-{_short(self.set.rstrip('/'))}"
        stem = f"{name.stem[:60]}-{_short(f'{self.name}:{self.size}:{identity}')}"
        return str(PurePosixPath(folder, name.parent, stem + re.sub(r"[^\w.]", "", name.suffix)))

    def as_json(self) -> dict[str, Any]:
        """For `from_json` of another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Wanted":
        """The inverse of `as_json`; raises TypeError, KeyError or DataError for anything else."""
        table = entry["table"]
        return cls(**{**entry, "table": cls.from_json(table) if isinstance(table, Mapping) else table})


def objects_of(entry: Wanted) -> list[Wanted]:
    """The objects to fetch for an entry, in order: its table, if that is remote, and itself."""
    return [entry.table, entry] if isinstance(entry.table, Wanted) else [entry]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
