"""How MiniGPT-4 makes its second stage's data with its first stage's model (arXiv 2304.10592, §3.2): the steps.

Each takes rows and yields rows, and depends on nothing else than its arguments.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from mmlab.curate.asking import Ask, answers, left_over, paid, told
from mmlab.curate.client import Message, NoReply
from mmlab.curate.journal import Row
from mmlab.curate.rules import caught_by
from mmlab.data.formats import IMAGE_EXTENSIONS
from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec, SampleError
from mmlab.data.turns import Turn


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

    def question(row: Row) -> list[Message]:
        return [{"role": "user", "content": f"{prompt}\n\n{row['text']}"}]

    for row, reply in answers(asked, ask, question, workers):
        if isinstance(reply, NoReply):
            failed.append((row, reply))
        else:
            yield {**_plain(row), "text": reply.text, "changed": reply.text != row["text"], **told(reply)}
    if failed and unrepaired == "retry":
        raise left_over(failed, len(rows), "descriptions were not repaired", "unrepaired=keep or drop")
    for row, fault in failed:
        cost = {} if fault.spent is None else paid(fault.spent)
        if unrepaired == "keep":
            yield {**_plain(row), "changed": False, "unrepaired": fault.reason, **cost}
        else:
            yield {**_plain(row), "fault": f"not repaired: {fault.reason}", **cost}


def sift(rows: Sequence[Row], rules: Sequence[str]) -> Iterator[Row]:
    """Step 4: which rules catch a text."""
    for row in rows:
        yield {**_plain(row), "caught": caught_by(row["text"], rules)}


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
