"""Requests to a language model, remote or local; replies are stored on disk, so that none is billed twice."""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mmlab.config.errors import RunError
from mmlab.curate.journal import write_whole

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`, as in the chat-completions protocol."""


class NoReply(RunError):
    """This prompt has no usable reply; others may have one.

    Args:
        reason: a few words under which faults are counted, such as "empty answer" or "429".
        message: the full sentence for the user.
        down: no attempt reached a model, so that other prompts will fail as well.
        spent: an unusable reply that was billed.
        kept: that reply is stored, and the request is not repeated.
    """

    def __init__(self, reason: str, message: str, down: bool = False, spent: "Reply | None" = None, kept: bool = False):
        super().__init__(message)
        self.reason = reason
        self.down = down
        self.spent = spent
        self.kept = kept


class Refused(RunError):
    """The endpoint rejects every prompt: the key, address or model is wrong."""


@dataclass(frozen=True)
class Reply:
    """A language model's reply.

    Attributes:
        text: without surrounding white space.
        finish: why it ended: `stop`, or a key of `UNUSABLE`.
        prompt_tokens, completion_tokens: as counted by the endpoint, failed attempts included; 0 if it counts none.
        retries: reason → number of retries.
        model: name that the endpoint reports.
        hash: name of the stored reply; empty before it is stored.
    """

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: dict[str, int] = field(default_factory=dict)
    model: str = ""
    hash: str = ""


UNUSABLE = {
    "length": ("finish_reason length", "was cut off at the token limit"),
    "content_filter": ("finish_reason content_filter", "was withheld by a content filter"),
    "empty": ("empty answer", "was empty in every attempt"),
}
"""finish → the reason under which such replies are counted, and the predicate of the error's sentence."""


class Backend(Protocol):
    """An endpoint or a local model.

    Attributes:
        model: its name.
        settings: everything else that a reply depends on.
    """

    model: str
    settings: dict[str, Any]

    def complete(self, messages: Sequence[Message], stop: threading.Event) -> Reply:
        """Reply to a dialogue; starts no further attempt once `stop` is set.

        Raises:
            NoReply: this prompt has no reply.
            Refused: no prompt has one.
        """
        ...


class Client:
    """Requests replies and stores each in a file named by the hash of (model, messages, settings).

    A reply is on disk before it is returned, so that after a kill only requests in flight are billed again. Threads
    may share a client; the same request from several threads is sent once.

    Args:
        backend: the endpoint or model.
        folder: where replies are stored.
    """

    def __init__(self, backend: Backend, folder: Path):
        self.backend = backend
        self.folder = folder
        self._lock = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}

    def __call__(self, messages: Sequence[Message], stop: threading.Event | None = None) -> Reply:
        """Reply to a dialogue that ends with the user's turn, from disk if the reply is stored.

        Args:
            messages: the dialogue.
            stop: once set, no further attempt is started.

        Raises:
            NoReply: there is no reply, or it was cut off, withheld by a filter, or empty.
            Refused: the backend rejects every prompt.
        """
        question = {
            "model": self.backend.model,
            "messages": [dict(message) for message in messages],
            "settings": self.backend.settings,
        }
        name = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        with self._lock:
            turn = self._asking.setdefault(name, threading.Lock())
        with turn:
            reply = self._kept(name, question) or self._ask(name, question, stop or threading.Event())
        if reply.finish in UNUSABLE:
            reason, how = UNUSABLE[reply.finish]
            raise NoReply(reason, f"the reply of {self.backend.model} {how}.", spent=reply, kept=True)
        return reply

    def _ask(self, name: str, question: dict[str, Any], stop: threading.Event) -> Reply:
        try:
            reply = replace(self.backend.complete(question["messages"], stop), hash=name)
        except NoReply as fault:
            fault.spent = fault.spent and replace(fault.spent, hash=name)
            raise
        kept = {**question, "reply": asdict(reply)}
        write_whole(self._file(name), json.dumps(kept, ensure_ascii=False, indent=1) + "\n")
        return reply

    def _kept(self, name: str, question: dict[str, Any]) -> Reply | None:
        try:
            kept = json.loads(self._file(name).read_text(encoding="utf-8"))
            return Reply(**kept["reply"]) if {**kept, "reply": None} == {**question, "reply": None} else None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None  # the file is damaged; request the reply again

    def _file(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.json"
