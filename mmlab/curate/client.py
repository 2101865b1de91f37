"""Requests to a language model, remote or local; replies are stored on disk, so that none is billed twice."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mmlab.config.errors import RunError
from mmlab.curate.config import LLMConfig
from mmlab.curate.journal import Row
from mmlab.runs.disk import to_json, write_text

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`, as in the chat-completions protocol."""

PATIENCE = 5
"""Unreachable requests in a row, with no reply to any other request meanwhile, after which the endpoint is down."""


class NoReply(RunError):
    """This prompt has no usable reply; others may have one.

    Args:
        reason: a few words under which faults are counted, such as "empty answer" or "429".
        message: the full sentence for the user.
        down: no attempt reached a model, so that other prompts will fail as well.
        spent: an unusable reply that was billed.
        stored: that reply is stored, and the request is not repeated.
    """

    def __init__(
        self, reason: str, message: str, down: bool = False, spent: "Reply | None" = None, stored: bool = False
    ):
        super().__init__(message)
        self.reason = reason
        self.down = down
        self.spent = spent
        self.stored = stored

    def usage(self) -> Row:
        """Like `Reply.usage`, of a reply that was billed."""
        return {} if self.spent is None else self.spent.usage()


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

    def usage(self) -> Row:
        """The fields of a row that account for its cost; rows with the same `reply` share one that was billed once."""
        tokens = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {"reply": self.hash, "retries": self.retries, **tokens}


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
        config: settings.
        backend: the endpoint or model.
        folder: where replies are stored.
    """

    def __init__(self, config: LLMConfig, backend: Backend, folder: Path):
        self.config = config
        self.backend = backend
        self.folder = folder
        self._lock = threading.Lock()
        self._requests: dict[str, threading.Lock] = {}

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
        name = hashlib.sha256(to_json(question, sort_keys=True).encode()).hexdigest()
        with self._lock:
            turn = self._requests.setdefault(name, threading.Lock())
        with turn:
            reply = self._stored(name, question) or self._request(name, question, stop or threading.Event())
        if reply.finish in UNUSABLE:
            reason, predicate = UNUSABLE[reply.finish]
            raise NoReply(reason, f"the reply of {self.backend.model} {predicate}.", spent=reply, stored=True)
        return reply

    def replies(
        self, rows: Sequence[Row], question: Callable[[Row], Sequence[Message]]
    ) -> Iterator[tuple[Row, Reply | NoReply]]:
        """Request a reply to each row's question in several threads; pairs come in the order of arrival.

        Raises:
            RunError: the endpoint seems to be down.
            Refused: the backend rejects every prompt.
        """
        stop, lock = threading.Event(), threading.Lock()
        arrived = in_a_row = 0

        def request(row: Row) -> tuple[Reply | NoReply | None, bool]:
            """The reply, and whether the endpoint replied to nobody while this request was running."""
            nonlocal arrived
            before = arrived
            try:
                reply = None if stop.is_set() else self(question(row), stop)
            except NoReply as error:
                reply = error
            with lock:
                down = isinstance(reply, NoReply) and reply.down
                arrived += not down and not _is_stored(reply)
                return reply, down and arrived == before

        waiting = iter(rows)
        with ThreadPoolExecutor(self.config.workers) as pool:
            running: dict[Future, Row] = {}
            try:
                while True:
                    while len(running) < 2 * self.config.workers and (row := next(waiting, None)) is not None:
                        running[pool.submit(request, row)] = row
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        row, (reply, silent) = running.pop(future), future.result()
                        assert reply is not None
                        if not _is_stored(reply):
                            in_a_row = in_a_row + 1 if silent else 0
                        if in_a_row == PATIENCE:
                            raise RunError(f"{PATIENCE} requests in a row failed, the last for {row['key']}: {reply}")
                        yield row, reply
            finally:
                stop.set()

    def _request(self, name: str, question: dict[str, Any], stop: threading.Event) -> Reply:
        try:
            reply = replace(self.backend.complete(question["messages"], stop), hash=name)
        except NoReply as fault:
            fault.spent = fault.spent and replace(fault.spent, hash=name)
            raise
        record = {**question, "reply": asdict(reply)}
        write_text(self._file(name), to_json(record, ensure_ascii=False, indent=1) + "\n")
        return reply

    def _stored(self, name: str, question: dict[str, Any]) -> Reply | None:
        try:
            record = json.loads(self._file(name).read_text(encoding="utf-8"))
            return Reply(**record["reply"]) if {**record, "reply": None} == {**question, "reply": None} else None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None  # the file is damaged; request the reply again

    def _file(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.json"


def _is_stored(reply: Reply | NoReply | None) -> bool:
    """Whether there is no reply because of one on disk, which says nothing about the endpoint now."""
    return isinstance(reply, NoReply) and reply.stored


def unanswered_error(failed: Sequence[tuple[Row, NoReply]], total: int, what: str, option: str) -> RunError:
    """The error for rows without a reply, which names what the user can do: a stored one does not change by itself.

    Args:
        failed: rows without a reply, at least one.
        total: number of rows.
        what: the predicate, such as "descriptions were not repaired".
        option: the setting that continues without them.
    """
    counts = Counter(fault.reason for _, fault in failed).most_common()
    reasons = ", ".join(f"{reason} {number}" for reason, number in counts)
    stored = sum(fault.stored for _, fault in failed)
    ways = []
    if stored < len(failed):
        ways.append("the same command retries" + (f" {len(failed) - stored} of them" if stored else ""))
    if stored:
        ways.append(
            "a stored reply that is cut off, filtered or empty stays so unless settings change, such as to a larger "
            "llm.settings.max_tokens"
        )
    row, fault = failed[0]
    return RunError(
        f"{len(failed)} of {total} {what} ({reasons}), the first is {row['key']}: {str(fault).rstrip('.')}; "
        f"{'; '.join(ways)}; {option} continues without them."
    )
