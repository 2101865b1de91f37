"""How LLaVA makes its instruction data with a language model that sees no picture (arXiv 2304.08485, §3): the steps.

Each takes rows and yields rows, and depends on nothing else than its arguments.
"""

from collections.abc import Callable, Iterator, Sequence

from mmlab.curate.asking import Ask, answers, left_over, paid, told
from mmlab.curate.client import Message, NoReply
from mmlab.curate.dialogue_text import Malformed, Pairs, read_description, read_dialogue
from mmlab.curate.journal import Row
from mmlab.curate.rules import caught_by
from mmlab.keyed import choose


def request(
    rows: Sequence[Row],
    ask: Ask,
    question: Callable[[Row], Sequence[Message]],
    workers: int = 1,
    unanswered: str = "retry",
) -> Iterator[Row]:
    """Step 1: `text` of each reply; rows come in the order of the answers.

    Args:
        rows: `key`, `sample`, `type`.
        ask: the language model.
        question: prompt, examples and context of a row.
        workers: questions at a time.
        unanswered: what becomes of a row without an answer: `retry` makes an error of it once all others are through,
            `drop` gives it a fault.

    Raises:
        RunError: rows without an answer, or an endpoint that seems to be down.
    """
    failed: list[tuple[Row, NoReply]] = []
    for row, reply in answers(rows, ask, question, workers):
        if isinstance(reply, NoReply):
            failed.append((row, reply))
        else:
            yield {**_plain(row), "text": reply.text, **told(reply)}
    if failed and unanswered == "retry":
        raise left_over(failed, len(rows), "questions got no answer", "unanswered=drop")
    for row, fault in failed:
        cost = {} if fault.spent is None else paid(fault.spent)
        yield {**_plain(row), "fault": fault.reason, **cost}


def parse(rows: Sequence[Row], requests: Sequence[str], seed: int) -> Iterator[Row]:
    """Step 2: `turns`, questions with their answers; a reply that is not of its type's form has a fault.

    Args:
        rows: of the step before.
        requests: what a detailed description is asked for by; one is drawn for each.
        seed: of that draw.
    """
    for row in rows:
        try:
            turns = read_reply(row["text"], row["type"], choose(requests, seed, f"request/{row['key']}"))
        except Malformed as error:
            yield {**_plain(row), "fault": error.reason}
        else:
            yield {**_plain(row), "turns": turns}


def read_reply(text: str, kind: str, description_request: str = "Describe the picture.") -> Pairs:
    """Questions and answers of a reply of one type: several of a conversation, one of the others.

    Raises:
        Malformed: see `read_dialogue` and `read_description`; `several questions` of complex reasoning.
    """
    if kind == "detail_description":
        return [(description_request, read_description(text))]
    pairs = read_dialogue(text)
    if kind == "complex_reasoning" and len(pairs) > 1:
        raise Malformed("several questions")
    return pairs


def sift(rows: Sequence[Row], rules: Sequence[str]) -> Iterator[Row]:
    """Step 3: which rules catch what the language model wrote, in the order of the rules."""
    for row in rows:
        texts = [text for turn in row["turns"] for text in turn]
        written = texts[1:] if row["type"] == "detail_description" else texts  # its request is ours
        names = {name for text in written for name in caught_by(text, rules)}
        yield {**_plain(row), "turns": row["turns"], "caught": [name for name in rules if name in names]}


def _plain(row: Row) -> Row:
    """What every step hands on."""
    return {name: row[name] for name in ("key", "sample", "type")}
