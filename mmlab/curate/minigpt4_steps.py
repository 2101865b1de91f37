"""The steps by which MiniGPT-4 makes its second stage's data with its first stage's model (arXiv 2304.10592, §3.2).

Each takes rows, yields rows and depends on nothing but its arguments.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from mmlab.curate.client import Client, Message, NoReply, unanswered_error
from mmlab.curate.journal import Row
from mmlab.curate.rules import caught_by
from mmlab.data.formats import IMAGE_EXTENSIONS
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import Picture, SampleError
from mmlab.data.turns import Turn


class Describer(Protocol):
    """A model that answers questions about images, such as `mmlab.evaluate.answers.Answerer`."""

    @property
    def tokenizer(self) -> Any: ...

    def decode(self, files: Sequence[bytes], /) -> Sequence[Picture]: ...

    def __call__(self, dialogues: Sequence[list[Turn]], pictures: Sequence[Sequence[Picture]], /) -> list[str]: ...

    def ask(self, question: str, pictures: int, /) -> list[Turn]: ...


def describe(rows: Sequence[Row], describer: Describer, index: ShardIndex, instruction: str) -> Iterator[Row]:
    """Step 1, on one batch: `text` and its `tokens` for each image; an unreadable image is a fault."""
    images = _images(rows, describer, index)
    readable = {key: image for key, image in images.items() if not isinstance(image, SampleError)}
    dialogues = [describer.ask(instruction, len(image)) for image in readable.values()]
    texts = describer(dialogues, list(readable.values())) if readable else []
    described = dict(zip(readable, texts, strict=True))
    for row in rows:
        if row["key"] in described:
            text = described[row["key"]]
            yield {**row, "text": text, "tokens": _tokens(describer, text)}
        else:
            yield {**row, "fault": str(images[row["key"]])}


def continue_short(
    rows: Sequence[Row], describer: Describer, index: ShardIndex, instruction: str, continuation: str, up_to: int
) -> Iterator[Row]:
    """Step 2, on one batch: the model continues a description of at most `up_to` tokens, and the texts are joined."""
    short = [row for row in rows if row["tokens"] <= up_to]
    images = list(_images(short, describer, index).values())
    dialogues = [
        [*describer.ask(instruction, len(image)), Turn("gpt", row["text"]), Turn("human", continuation)]
        for row, image in zip(short, images, strict=True)
    ]
    texts = describer(dialogues, images) if short else []
    added = {row["key"]: text for row, text in zip(short, texts, strict=True)}
    for row in rows:
        continued = row["key"] in added
        text = f"{row['text']} {added[row['key']]}".strip() if continued else row["text"]
        tokens = _tokens(describer, text) if continued else row["tokens"]
        yield {"key": row["key"], "sample": row["sample"], "text": text, "tokens": tokens, "continued": continued}


def repair(rows: Sequence[Row], client: Client, prompt: str, unrepaired: str) -> Iterator[Row]:
    """Step 3: a language model repairs each text; rows come in the order of the replies.

    Args:
        rows: of step 2.
        client: asks the language model.
        prompt: precedes the text.
        unrepaired: without a reply, `retry` raises an error once all other rows are done, `keep` leaves the text
            unchanged, and `drop` yields a fault.

    Raises:
        RunError: texts without a reply, or the endpoint seems to be down.
    """
    yield from ({**_common(row), "changed": False} for row in rows if not row["text"].strip())
    failed: list[tuple[Row, NoReply]] = []

    def question(row: Row) -> list[Message]:
        return [{"role": "user", "content": f"{prompt}\n\n{row['text']}"}]

    for row, reply in client.replies([row for row in rows if row["text"].strip()], question):
        if isinstance(reply, NoReply):
            failed.append((row, reply))
        else:
            changed = reply.text != row["text"]
            yield {**_common(row), "text": reply.text, "changed": changed, "model": reply.model, **reply.usage()}
    if failed and unrepaired == "retry":
        raise unanswered_error(failed, len(rows), "descriptions were not repaired", "unrepaired=keep or drop")
    for row, fault in failed:
        if unrepaired == "keep":
            yield {**_common(row), "changed": False, "unrepaired": fault.reason, **fault.usage()}
        else:
            yield {**_common(row), "fault": f"not repaired: {fault.reason}", **fault.usage()}


def sift(rows: Sequence[Row], rules: Sequence[str]) -> Iterator[Row]:
    """Step 4: the names of the rules that catch a text."""
    for row in rows:
        yield {**_common(row), "caught": caught_by(row["text"], rules)}


def _images(rows: Sequence[Row], describer: Describer, index: ShardIndex) -> dict[str, Any]:
    """key → the image, as the list that `Describer` takes, or the SampleError that tells why it is unreadable."""
    images: dict[str, Any] = {}
    for row in rows:
        try:
            (data, *_) = index.read(row["sample"], IMAGE_EXTENSIONS).values()
            images[row["key"]] = describer.decode([data])
        except SampleError as error:
            images[row["key"]] = error
    return images


def _tokens(describer: Describer, text: str) -> int:
    return len(describer.tokenizer(text, add_special_tokens=False)["input_ids"])


def _common(row: Row) -> Row:
    return {"key": row["key"], "sample": row["sample"], "text": row["text"]}
