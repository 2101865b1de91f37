"""Unfinished shards, which a later build can continue."""

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmlab.data.formats import KeyMaker, Members
from mmlab.data.shard_files import NumberedTars, check_members
from mmlab.data.tally import Tally
from mmlab.runs.disk import to_json, write_text

_SAVE_EVERY = 5.0  # seconds


class ShardDraft:
    """Unfinished shards and how far they have come: rows converted, their counts, their names, the ends of the tars.

    `several` is the number of samples with several pictures in a build with splits.

    Args:
        folder: where they are.
        splits: names of the splits, each of which gets a subfolder.
        max_samples: samples per shard.
        identity: what decides the samples: earlier shards with the same are continued; None: none are.
    """

    def __init__(self, folder: Path, splits: Iterable[str], max_samples: int, identity: str | None):
        self.folder, self.max_samples, self.identity = folder, max_samples, identity
        self.keys, self.tally, self.converted, self.several = KeyMaker(), Tally(), 0, 0
        self._state, self._names = folder / "state.json", folder / "names"
        state = self._read()
        if state is None:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            self._names.touch()
            state = {"converted": 0, "several": 0, "names": 0, "tally": self.tally.as_json(), "tars": {}}
        self.converted, self.several, self.tally = state["converted"], state["several"], Tally.from_json(state["tally"])
        with self._names.open("r+b") as file:
            for line in file.read(state["names"]).splitlines():
                self.keys(json.loads(line)[0])
        self._log = self._names.open("r+b")
        self._log.truncate(state["names"])
        self._log.seek(state["names"])
        self.tars: dict[str, NumberedTars] = {}
        for name in splits:
            (folder / name).mkdir(exist_ok=True)
            self.tars[name] = NumberedTars(folder / name, max_samples, *state["tars"].get(name, (0, 0)))
        self._saved = time.monotonic()

    def _read(self) -> dict[str, Any] | None:
        """What a killed build with the same identity has saved, if all of it is there."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            if self.identity is None or state["identity"] != self.identity:
                return None
            size, _ = self.max_samples, state["several"]  # an earlier version had none, and other names
            ends = {
                self.folder / name / f"shard-{number:06d}.tar": offset if number == count // size else 0
                for name, (count, offset) in state["tars"].items()
                for number in range(-(-count // size))
            } | {self._names: state["names"]}
            return state if all(path.stat().st_size >= end for path, end in ends.items()) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, name: str, members: Members, split: str, digests: Sequence[str] = ()) -> None:
        """Write a sample to the tars of a split; `digests` are of its pictures, see `digests_of`."""
        key = self.keys(name)
        check_members(key, members)
        self._log.write(to_json([name, *digests]).encode() + b"\n")
        self.several += len(digests) > 1
        full = self.tars[split].write(key, members)
        if full or time.monotonic() - self._saved > _SAVE_EVERY:
            self.save(self.converted + 1)

    def digests(self) -> list[list[str]]:
        """The digests of the pictures of each sample, in the order in which they were written."""
        with self._names.open("rb") as file:
            return [json.loads(line)[1:] for line in file]

    def save(self, converted: int) -> None:
        """Record that so many entries are converted."""
        self._log.flush()
        state = {
            "identity": self.identity,
            "converted": converted,
            "several": self.several,
            "names": self._log.tell(),
            "tally": self.tally.as_json(),
            "tars": {name: tars.flush() for name, tars in self.tars.items()},
        }
        write_text(self._state, to_json(state))
        self._saved = time.monotonic()

    def close(self) -> None:
        """End all tars."""
        for tars in self.tars.values():
            tars.close()
        self._log.close()
