"""How MiniGPT-4 makes its second stage's data with its first stage's model (arXiv 2304.10592, §3.2): the steps.

Each takes rows and yields rows, and depends on nothing else than its arguments.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from torch import Tensor

from mmlab.config.errors import RunError
from mmlab.curate.client import Message, NoReply, Reply
from mmlab.curate.journal import Row
from mmlab.curate.rules import caught_by
from mmlab.data.formats import IMAGE_EXTENSIONS
from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec, SampleError
from mmlab.data.turns import Turn

Ask = Callable[[Sequence[Message], threading.Event], Reply]
"""Asks a language model, and gives up when the event is set: `mmlab.curate.client.Client`."""

PATIENCE = 5
"""After as many questions in a row that nothing answered, the endpoint is down."""


class Describer(Protocol):
    """What speaks about pictures: `mmlab.evaluate.answers.Answerer`."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def spec(self) -> ImageSpec: ...

    def __call__(self, dialogues: Sequence[list[Turn]], pictures: Sequence[Tensor | None]) -> list[str]: ...

    def ask(self, question: str, picture: Tensor | None) -> list[Turn]: ...


def describe(rows: Sequence[Row], describer: Describer, index: ShardIndex, instruction: str) -> Iterator[Row]:
    """Step 1, on one batch: `text` and its `tokens` for each picture; a picture that cannot be read is a fault."""
    seen = _pictures(rows, describer, index)
    keys = [row["key"] for row in rows if isinstance(seen[row["key"]], Tensor)]
    pictures = [seen[key] for key in keys]
    texts = describer([describer.ask(instruction, picture) for picture in pictures], pictures) if keys else []
    said = dict(zip(keys, texts, strict=True))
    for row in rows:
        if row["key"] in said:
            text = said[row["key"]]
            yield {**row, "text": text, "tokens": _tokens(describer, text)}
        else:
            yield {**row, "fault": str(seen[row["key"]])}


def go_on(
    rows: Sequence[Row],
    describer: Describer,
    index: ShardIndex,
    instruction: str,
    continuation: str,
    up_to: int,
) -> Iterator[Row]:
    """Step 2, on one batch: a description of `up_to` tokens or fewer is followed by another turn, and both joined."""
    short = [row for row in rows if row["tokens"] <= up_to]
    seen = _pictures(short, describer, index)
    pictures = [seen[row["key"]] for row in short]
    dialogues = [
        [*describer.ask(instruction, picture), Turn("gpt", row["text"]), Turn("human", continuation)]
        for row, picture in zip(short, pictures, strict=True)
    ]
    more = describer(dialogues, pictures) if short else []
    added = {row["key"]: text for row, text in zip(short, more, strict=True)}
    for row in rows:
        continued = row["key"] in added
        text = f"{row['text']} {added[row['key']]}".strip() if continued else row["text"]
        tokens = _tokens(describer, text) if continued else row["tokens"]
        yield {"key": row["key"], "sample": row["sample"], "text": text, "tokens": tokens, "continued": continued}


def repair(
    rows: Sequence[Row],
    ask: Ask,
    prompt: str,
    workers: int = 1,
    unrepaired: str = "retry",
) -> Iterator[Row]:
    """Step 3: a language model mends each text; rows come in the order of the answers.

    Args:
        rows: of the step before.
        ask: the language model.
        prompt: what it is told, above the text.
        workers: questions at a time.
        unrepaired: what becomes of a text without an answer: `retry` makes an error of it once all others are
            through, `keep` leaves it as it is, `drop` gives it a fault.

    Raises:
        RunError: texts without an answer, or an endpoint that seems to be down.
    """
    yield from ({**_plain(row), "changed": False} for row in rows if not row["text"].strip())
    asked = [row for row in rows if row["text"].strip()]
    failed: list[tuple[Row, NoReply]] = []
    for row, reply in _answers(asked, ask, prompt, workers):
        if isinstance(reply, NoReply):
            failed.append((row, reply))
            continue
        told = {"text": reply.text, "changed": reply.text != row["text"], "model": reply.model}
        yield {**_plain(row), **told, **_paid(reply)}
    if failed and unrepaired == "retry":
        raise _not_repaired(failed, len(rows))
    for row, fault in failed:
        paid = {} if fault.spent is None else _paid(fault.spent)
        if unrepaired == "keep":
            yield {**_plain(row), "changed": False, "unrepaired": fault.reason, **paid}
        else:
            yield {**_plain(row), "fault": f"not repaired: {fault.reason}", **paid}


def sift(rows: Sequence[Row], rules: Sequence[str]) -> Iterator[Row]:
    """Step 4: which rules catch a text."""
    for row in rows:
        yield {**_plain(row), "caught": caught_by(row["text"], rules)}


def _not_repaired(failed: Sequence[tuple[Row, NoReply]], total: int) -> RunError:
    """Says what a person can do: an answer that is kept would be the same again."""
    counted = Counter(fault.reason for _, fault in failed).most_common()
    kept = sum(fault.kept for _, fault in failed)
    ways = []
    if kept < len(failed):
        ways.append("the same command asks again" + (f" for {len(failed) - kept} of them" if kept else ""))
    if kept:
        ways.append(
            "an answer that is cut off, filtered or empty stays as it is; other settings ask anew, such as a larger "
            "llm.settings.max_tokens"
        )
    return RunError(
        f"{len(failed)} of {total} descriptions were not repaired ({_counted(counted)}), the first is "
        f"{failed[0][0]['key']}: {str(failed[0][1]).rstrip('.')}; {'; '.join(ways)}; unrepaired=keep or drop goes on."
    )


def _answers(rows: Sequence[Row], ask: Ask, prompt: str, workers: int) -> Iterator[tuple[Row, Reply | NoReply]]:
    """Each row with its answer, as they come; several threads ask, and few questions wait."""
    stop = threading.Event()
    in_a_row = 0

    def one(row: Row) -> Reply | NoReply | None:
        if stop.is_set():
            return None
        try:
            return ask([{"role": "user", "content": f"{prompt}\n\n{row['text']}"}], stop)
        except NoReply as error:
            return error

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
                    row, reply = running.pop(future), future.result()
                    assert reply is not None
                    fault = reply if isinstance(reply, NoReply) else None
                    if fault is None or not fault.kept:  # what was kept says nothing of the endpoint now
                        in_a_row = in_a_row + 1 if fault is not None and fault.down else 0
                    if in_a_row == PATIENCE:
                        raise RunError(f"{PATIENCE} in a row got no answer, now {row['key']}: {reply}")
                    yield row, reply
        finally:
            stop.set()


def _pictures(rows: Sequence[Row], describer: Describer, index: ShardIndex) -> dict[str, Any]:
    """key → the picture, uint8 `[3, H, W]`, or the SampleError that says why it cannot be read."""
    found: dict[str, Any] = {}
    for row in rows:
        try:
            (data, *_) = index.read(row["sample"], IMAGE_EXTENSIONS).values()
            found[row["key"]] = decode_image(data, describer.spec)
        except SampleError as error:
            found[row["key"]] = error
    return found


def _tokens(describer: Describer, text: str) -> int:
    return len(describer.tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain(row: Row) -> Row:
    """What every step hands on."""
    return {"key": row["key"], "sample": row["sample"], "text": row["text"]}


def _paid(reply: Reply) -> Row:
    """What an answer cost; `reply` names it, as texts that are alike share one."""
    usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
    return {"reply": reply.hash, "retries": reply.retries, **usage}


def _counted(counts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts)
