"""One question to a language model, wherever it runs: kept on disk, so that nothing is asked or paid twice."""

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
"""`role` (system, user or assistant) and `content`, as chat-completions endpoints take them."""


class NoReply(RunError):
    """This prompt got no usable answer; others may.

    Args:
        reason: a few words that faults are counted under, such as "empty answer" or "429".
        message: the sentence for a person.
        down: nothing answered at all, so others will not get an answer either.
        spent: an answer that was paid for all the same.
        kept: that answer lies on the disk, and the question is not asked again.
    """

    def __init__(self, reason: str, message: str, down: bool = False, spent: "Reply | None" = None, kept: bool = False):
        super().__init__(message)
        self.reason = reason
        self.down = down
        self.spent = spent
        self.kept = kept


class Refused(RunError):
    """The endpoint answers nobody who asks like this: a wrong key, address or model."""


@dataclass(frozen=True)
class Reply:
    """What a language model said.

    Attributes:
        text: the answer, without white space around it.
        finish: why it ended: `stop`, or a name in `UNUSABLE`.
        prompt_tokens, completion_tokens: as the endpoint counts them, rejected answers included; 0 where it does not.
        retries: reason → how often it was asked again for it.
        model: the name that the endpoint gives itself.
        hash: names the reply among those kept; empty before it is kept.
    """

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: dict[str, int] = field(default_factory=dict)
    model: str = ""
    hash: str = ""


UNUSABLE = {
    "length": ("finish_reason length", "was cut off at its longest"),
    "content_filter": ("finish_reason content_filter", "was held back by a content filter"),
    "empty": ("empty answer", "was empty each time"),
}
"""finish → what such answers are counted under, and what became of one."""


class Backend(Protocol):
    """What answers: an endpoint or a local model.

    Attributes:
        model: its name.
        settings: all else that an answer depends on.
    """

    model: str
    settings: dict[str, Any]

    def complete(self, messages: Sequence[Message], stop: threading.Event) -> Reply:
        """Answer; raises NoReply for this prompt's sake, Refused for everybody's. Does not begin anew after `stop`."""
        ...


class Client:
    """Asks a backend, and keeps each reply in a file named by the hash of (model, messages, settings).

    A reply is on the disk before it is returned: a process that is killed pays again only for what was still on its
    way. Threads may share a client; the same question at the same time is asked once.

    Args:
        backend: what answers.
        folder: of the replies.
    """

    def __init__(self, backend: Backend, folder: Path):
        self.backend = backend
        self.folder = folder
        self._lock = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}

    def __call__(self, messages: Sequence[Message], stop: threading.Event | None = None) -> Reply:
        """Answer a dialogue that ends with the user's turn.

        Args:
            messages: the dialogue.
            stop: when it is set, the question is given up instead of being asked once more.

        Raises:
            NoReply: no answer, or one that is not whole: cut off, held back by a filter, or empty.
            Refused: the backend answers nothing.
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
            raise NoReply(reason, f"the answer of {self.backend.model} {how}.", spent=reply, kept=True)
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
            return None  # damaged, by a disk or an editor: asked again

    def _file(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.json"
