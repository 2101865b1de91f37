"""The steps by which LLaVA makes instruction data with a language model that sees no image (arXiv 2304.08485, §3).

Each takes rows, yields rows and depends on nothing but its arguments. Replies are parsed strictly:

Question:             A block is a label and its text, a line of equals signs separates blocks, and questions and
What is this?         answers alternate. LLaVA's published examples have this form.
===
Answer:
A cat.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from mmlab.curate.client import Client, Message, NoReply, unanswered_error
from mmlab.curate.journal import Row
from mmlab.curate.rules import caught_by
from mmlab.data.turns import IMAGE
from mmlab.keyed import choose

_SEPARATOR = re.compile(r"^[ \t]*={3,}[ \t]*$", re.MULTILINE)
_LABEL = re.compile(r"[ \t]*(Question|Answer)[ \t]*:[ \t]*")
# A label within a turn, in any spelling.
_INNER_LABEL = re.compile(r"^[ \t*#]*(?:Question|Answer)[ \t]*\d*[ \t*]*:", re.MULTILINE | re.IGNORECASE)

Pairs = list[tuple[str, str]]
"""Questions with their answers."""


class Malformed(Exception):
    """A reply that does not have the required form; its text is the reason, under which such replies are counted."""


def request(
    rows: Sequence[Row], client: Client, question: Callable[[Row], Sequence[Message]], unanswered: str
) -> Iterator[Row]:
    """Step 1: `text` of each reply; rows come in the order of the replies.

    Args:
        rows: `key`, `sample`, `type`.
        client: asks the language model.
        question: prompt, examples and context of a row.
        unanswered: without a reply, `retry` raises an error once all other rows are done, and `drop` yields a fault.

    Raises:
        RunError: rows without a reply, or the endpoint seems to be down.
    """
    failed: list[tuple[Row, NoReply]] = []
    for row, reply in client.replies(rows, question):
        if isinstance(reply, NoReply):
            failed.append((row, reply))
        else:
            yield {**_common(row), "text": reply.text, "model": reply.model, **reply.usage()}
    if failed and unanswered == "retry":
        raise unanswered_error(failed, len(rows), "questions got no reply", "unanswered=drop")
    for row, fault in failed:
        yield {**_common(row), "fault": fault.reason, **fault.usage()}


def parse(rows: Sequence[Row], requests: Sequence[str], seed: int) -> Iterator[Row]:
    """Step 2: `turns`, questions with their answers; a reply without its type's form has a fault.

    Args:
        rows: of step 1.
        requests: one is drawn as the question of each detailed description.
        seed: of that draw.
    """
    for row in rows:
        try:
            turns = parse_reply(row["text"], row["type"], choose(requests, seed, f"request/{row['key']}"))
        except Malformed as error:
            yield {**_common(row), "fault": str(error)}
        else:
            yield {**_common(row), "turns": turns}


def sift(rows: Sequence[Row], rules: Sequence[str]) -> Iterator[Row]:
    """Step 3: the names of the rules that catch what the language model wrote, in the order of the rules."""
    for row in rows:
        texts = [text for turn in row["turns"] for text in turn]
        written = texts[1:] if row["type"] == "detail_description" else texts  # its question is one of `requests`
        names = {name for text in written for name in caught_by(text, rules)}
        yield {**_common(row), "turns": row["turns"], "caught": [name for name in rules if name in names]}


def parse_reply(text: str, kind: str, description_request: str = "Describe the image.") -> Pairs:
    """Parse a reply of one response type: several pairs for a conversation, one for the other types.

    Raises:
        Malformed: see `parse_dialogue` and `parse_description`; `several questions` in complex reasoning.
    """
    if kind == "detail_description":
        return [(description_request, parse_description(text))]
    pairs = parse_dialogue(text)
    if kind == "complex_reasoning" and len(pairs) > 1:
        raise Malformed("several questions")
    return pairs


def parse_dialogue(text: str) -> Pairs:
    """Parse questions and answers; nothing is left out or guessed.

    Raises:
        Malformed: `text without a label`, `labels out of order`, `label within a turn` (a missing separator), `empty
            turn`, `question without an answer`, or `image marker`.
    """
    blocks = _SEPARATOR.split(_normalized(text))
    # A separator before the first or after the last turn is harmless.
    blocks = blocks[int(not blocks[0].strip()) : len(blocks) - int(not blocks[-1].strip())]
    turns = [_turn(block.strip(), ("Question", "Answer")[i % 2]) for i, block in enumerate(blocks)]
    if not turns:
        raise Malformed("empty turn")
    if len(turns) % 2:
        raise Malformed("question without an answer")
    return list(zip(turns[::2], turns[1::2], strict=True))


def parse_description(text: str) -> str:
    """Return the one text of a reply.

    Raises:
        Malformed: `empty turn`, `labels in a description`, or `image marker`.
    """
    text = _normalized(text)
    if _INNER_LABEL.search(text) or _SEPARATOR.search(text):
        raise Malformed("labels in a description")
    return _checked(text)


def _normalized(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


def _turn(block: str, expected: str) -> str:
    label = _LABEL.match(block)
    if label is None:
        raise Malformed("text without a label" if block else "empty turn")
    if label[1] != expected:
        raise Malformed("labels out of order")
    text = block[label.end() :].strip()
    if _INNER_LABEL.search(text):
        raise Malformed("label within a turn")
    return _checked(text)


def _checked(text: str) -> str:
    """Refuse a text that is empty or contains the mark that training replaces by the image."""
    if not text:
        raise Malformed("empty turn")
    if IMAGE in text:
        raise Malformed("image marker")
    return text


def _common(row: Row) -> Row:
    return {name: row[name] for name in ("key", "sample", "type")}
