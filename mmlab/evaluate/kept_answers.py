"""Answers kept on the disk as they come, so that an evaluation that was killed goes on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class KeptAnswers:
    """A file of answers, one line each, under a first line that says what they answer.

    Args:
        path: the file; it is there as long as the evaluation is unfinished.
        about: what the answers depend on, as JSON data. Those to anything else are thrown away.

    Attributes:
        known: place of a question → its answer, a text or other JSON data.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        self._head = json.dumps(about, sort_keys=True)
        self.known = self._read()

    def add(self, answers: Mapping[int, Any]) -> None:
        """Keep answers, and wait until they are on the disk."""
        if not self.known:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self._head + "\n", encoding="utf-8")
        self.known |= answers
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps([n, answer]) + "\n" for n, answer in answers.items())
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Take the file away, once what was made of it is written."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[int, Any]:
        if not self.path.is_file():
            return {}
        data = self.path.read_text(encoding="utf-8", errors="replace")
        whole = data[: data.rfind("\n") + 1]  # a killed process may leave half a line
        lines = whole.split("\n")[:-1]
        if not lines or lines[0] != self._head:
            return {}
        if len(whole) < len(data):
            self.path.write_text(whole, encoding="utf-8")
        return dict(map(json.loads, lines[1:]))
