"""What the page keeps of each visitor: in memory, and in a folder that is deleted when the visitor leaves."""

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Generic, TypeVar


@dataclass
class Visit:
    """One visitor's session.

    Attributes:
        folder: of the pictures that the visitor's page shows; it need not exist.
        stop: ends what is computed for the visitor, once set.
        left: whether the visitor has left.
    """

    folder: Path
    stop: Event = field(default_factory=Event)
    left: bool = False

    def place(self, suffix: str = "") -> Path:
        """A new path in the folder. It never returns, as browsers keep what they have loaded from one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{secrets.token_hex(8)}{suffix}"

    def forget(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


V = TypeVar("V", bound=Visit)


class Visits(Generic[V]):
    """The sessions by their key.

    Args:
        root: the folder of their folders.
        new: starts a session with its folder.
    """

    def __init__(self, root: Path, new: Callable[[Path], V]):
        self.root, self.new = root, new
        self.open: dict[str, V] = {}
        self._closed = False
        self._lock = Lock()

    def of(self, key: str) -> V:
        """The session of a visitor, new if it is the first time."""
        with self._lock:
            if key not in self.open:
                self.open[key] = self.new(self.root / secrets.token_hex(8))
            return self.open[key]

    def start(self, key: str) -> V:
        """The session of a visitor for whom something is now computed; nothing is once the server has ended."""
        visit = self.of(key)
        with self._lock:
            if self._closed:
                visit.stop.set()
            else:
                visit.stop.clear()
        return visit

    def end(self, key: str) -> None:
        """Stop what is computed for a visitor, and delete what is kept."""
        with self._lock:
            visit = self.open.pop(key, None)
        if visit is not None:
            visit.left = True
            visit.stop.set()
            visit.forget()

    def close(self) -> None:
        """Stop what is computed for all visitors: the server ends."""
        with self._lock:
            self._closed = True
            for visit in self.open.values():
                visit.stop.set()
