"""Many questions to a language model: several at a time, in no order, and an end when nobody answers."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from mmlab.config.errors import RunError
from mmlab.curate.client import Message, NoReply, Reply
from mmlab.curate.journal import Row

PATIENCE = 5
"""After as many questions in a row that nothing answered, the endpoint is down."""

Ask = Callable[[Sequence[Message], threading.Event], Reply]
"""Asks a language model, and gives up when the event is set: `mmlab.curate.client.Client`."""


def answers(
    rows: Sequence[Row], ask: Ask, question: Callable[[Row], Sequence[Message]], workers: int
) -> Iterator[tuple[Row, Reply | NoReply]]:
    """Each row with its answer, as they come; several threads ask, and few questions wait.

    Raises:
        RunError: an endpoint that seems to be down.
    """
    stop, lock = threading.Event(), threading.Lock()
    answered = in_a_row = 0

    def one(row: Row) -> tuple[Reply | NoReply | None, bool]:
        """The answer, and whether the endpoint was silent all the while, to others, too."""
        nonlocal answered
        before = answered
        try:
            reply = None if stop.is_set() else ask(question(row), stop)
        except NoReply as error:
            reply = error
        with lock:
            down = isinstance(reply, NoReply) and reply.down
            answered += not down and not _kept(reply)
            return reply, down and answered == before

    waiting = iter(rows)
    with ThreadPoolExecutor(workers) as pool:
        running: dict[Future, Row] = {}
        try:
            while True:
                while len(running) < 2 * workers and (row := next(waiting, None)) is not None:
                    running[pool.submit(one, row)] = row
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    row, (reply, silent) = running.pop(future), future.result()
                    assert reply is not None
                    if not _kept(reply):
                        in_a_row = in_a_row + 1 if silent else 0
                    if in_a_row == PATIENCE:
                        raise RunError(f"{PATIENCE} in a row got no answer, now {row['key']}: {reply}")
                    yield row, reply
        finally:
            stop.set()


def _kept(reply: Reply | NoReply | None) -> bool:
    """Whether there is no answer because of one on the disk, which says nothing of the endpoint now."""
    return isinstance(reply, NoReply) and reply.kept


def told(reply: Reply) -> Row:
    """What a row keeps of a reply beside its text."""
    return {"model": reply.model, **paid(reply)}


def paid(reply: Reply) -> Row:
    """What an answer cost; `reply` names it, as questions that are alike share one."""
    usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
    return {"reply": reply.hash, "retries": reply.retries, **usage}


def left_over(failed: Sequence[tuple[Row, NoReply]], asked: int, what: str, way_out: str) -> RunError:
    """The error for questions without an answer; it says what a person can do, as one that is kept stays the same.

    Args:
        failed: rows without an answer, at least one.
        asked: how many rows there were.
        what: what they are short of, such as "descriptions were not repaired".
        way_out: the option that goes on without them.
    """
    counted = Counter(fault.reason for _, fault in failed).most_common()
    reasons = ", ".join(f"{name} {number}" for name, number in counted)
    kept = sum(fault.kept for _, fault in failed)
    ways = []
    if kept < len(failed):
        ways.append("the same command asks again" + (f" for {len(failed) - kept} of them" if kept else ""))
    if kept:
        ways.append(
            "an answer that is cut off, filtered or empty stays as it is; other settings ask anew, such as a larger "
            "llm.settings.max_tokens"
        )
    (row, fault), *_ = failed
    return RunError(
        f"{len(failed)} of {asked} {what} ({reasons}), the first is {row['key']}: {str(fault).rstrip('.')}; "
        f"{'; '.join(ways)}; {way_out} goes on."
    )
