"""The turns of a record, checked and with their image markers read."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmlab.data.sample_types import SampleError
from mmlab.data.turns import IMAGE, Dialogue, Turn

_OWN_LINE = re.compile(rf"^[ \t]*{IMAGE}[ \t]*$\n?", re.MULTILINE)


def listed_in(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The `questions` or `conversations` of a record; raises SampleError `turns` if they are no list of objects."""
    items = record.get(name)
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise SampleError("turns", f"The record's {name} are missing or not a list of objects.")
    return items


def turns_of(item: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of one of a record's `questions`: perhaps a system message, then it and its `follow_ups`."""
    follow_ups = item.get("follow_ups") or []
    if not isinstance(follow_ups, list) or not all(isinstance(one, dict) for one in follow_ups):
        raise SampleError("turns", "The follow_ups of a question are not a list of objects.")
    turns = [{"from": "system", "value": item["system"]}] if item.get("system") else []
    for one in (item, *follow_ups):
        turns += [{"from": "human", "value": one.get("question")}, {"from": "gpt", "value": one.get("answer")}]
    return turns


def used_turns(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns of a conversation that are used, perhaps with one from `system` first.

    As in LLaVA's code (`preprocess_v1`), an answer before the first question is skipped. A last question without an
    answer has nothing to learn, and is left out.
    """
    system = list(items[:1]) if items and items[0].get("from") == "system" else []
    turns = list(items[len(system) :])
    if turns and turns[0].get("from") == "gpt":
        turns = turns[1:]
    if len(turns) > 1 and turns[-1].get("from") == "human":
        turns = turns[:-1]
    return system + turns


def question_of(turns: Sequence[dict[str, Any]], pictures: int) -> dict[str, Any]:
    """Turns as one of a record's `questions`, without the marker of a single picture: the inverse of `turns_of`.

    Args:
        turns: of a dialogue.
        pictures: number of the sample's pictures.

    Raises:
        SampleError: as `conversations_of`.
    """
    _, dialogue = read_turns(list(turns), pictures)
    pairs = [
        {"question": question.text.strip(), "answer": answer.text}
        for question, answer in zip(dialogue[::2], dialogue[1::2], strict=True)
    ]
    item: dict[str, Any] = {"system": dialogue[0].system} if dialogue[0].system else {}
    return item | pairs[0] | ({"follow_ups": pairs[1:]} if pairs[1:] else {})


def read_question(item: dict[str, Any], pictures: int) -> tuple[int | None, Dialogue]:
    """As `read_turns`, for a question and its answer, and what follows them."""
    marked, dialogue = read_turns(turns_of(item), pictures)
    if item["question"] and not dialogue[0].text.strip():  # "" stands for an image without a question, see `_place`
        raise SampleError("empty-question", "A question is blank.")
    return marked, dialogue


def read_turns(items: list[dict[str, Any]], pictures: int) -> tuple[int | None, Dialogue]:
    """Read a conversation.

    Args:
        items: turns of the record.
        pictures: number of the sample's pictures.

    Returns:
        The number of the turn that marks the picture, if one does; and the turns without the marker, or with those of
        several pictures.

    Raises:
        SampleError: as `conversations_of`.
    """
    items = used_turns(items)
    system = _system(items[0]) if items and items[0].get("from") == "system" else None
    dialogue = _alternating(items[1:] if items and items[0].get("from") == "system" else items)
    dialogue[0] = replace(dialogue[0], system=system)
    return (None, _with_several(dialogue, pictures)) if pictures > 1 else _with_one(dialogue, pictures)


def _with_one(dialogue: Dialogue, pictures: int) -> tuple[int | None, Dialogue]:
    """(the turn that marks the picture, if one does; the turns without the marker)."""
    dialogue, marks = list(dialogue), list[int]()
    for i in range(0, len(dialogue), 2):
        text, count = _without_markers(dialogue[i].text)
        marks += [i] * count
        if count:
            dialogue[i] = replace(dialogue[i], text=text)
    if not marks and pictures and IMAGE in dialogue[0].text:  # marked within a line
        dialogue[0] = replace(dialogue[0], text=dialogue[0].text.replace(IMAGE, "", 1).strip())
        marks = [0]
    if len(marks) > 1 and pictures:
        raise SampleError("pictures", f"The conversation marks {len(marks)} images, but the sample has one.")
    return (marks[0] if marks else None), dialogue


def _with_several(dialogue: Dialogue, pictures: int) -> Dialogue:
    """The turns with the markers of several pictures; without any, as they are."""
    count = sum(turn.text.count(IMAGE) for turn in dialogue[::2])
    if count not in (0, pictures):
        marked = "1 image" if count == 1 else f"{count} images"
        raise SampleError("pictures", f"The conversation marks {marked}, but the sample has {pictures}.")
    return [replace(turn, images=turn.text.count(IMAGE)) if turn.role == "human" else turn for turn in dialogue]


def _alternating(items: list[dict[str, Any]]) -> Dialogue:
    """The turns of a conversation without a system message, each as in the record."""
    dialogue: Dialogue = []
    for i, item in enumerate(items):
        role, text = item.get("from"), item.get("value")
        if role not in ("human", "gpt"):
            raise SampleError("role", f"A turn is from {role!r}; turns are from 'human' and 'gpt'.")
        if role != ("human", "gpt")[i % 2]:
            raise SampleError("order", "The turns do not alternate between human and gpt, human first.")
        if role == "gpt" and not (isinstance(text, str) and text.strip()):
            raise SampleError("empty-answer", "An answer is empty or not text.")
        if not isinstance(text, str):
            raise SampleError("empty-question", "A question is not text.")
        dialogue.append(Turn(role, text))
    if len(dialogue) < 2:
        raise SampleError("no-answer", "The conversation has no question with an answer.")
    if dialogue[-1].role == "human":
        raise SampleError("order", "The conversation's last question has no answer.")
    return dialogue


def _system(item: dict[str, Any]) -> str | None:
    """The text of a system turn; None for an empty one."""
    text = item.get("value")
    if not isinstance(text, str):
        raise SampleError("role", "A system message is not text.")
    return text.strip() or None


def _without_markers(text: str) -> tuple[str, int]:
    """A question without the image markers at its start, at its end or on a line of their own; others are text."""
    rest, count = _OWN_LINE.subn("", text)
    if not count:
        bare = text.strip()
        if bare.startswith(IMAGE):
            rest, count = bare[len(IMAGE) :], 1
        elif bare.endswith(IMAGE):
            rest, count = bare[: -len(IMAGE)], 1
        count += len(_OWN_LINE.findall(rest))
    return (rest.strip(), count) if count else (text, 0)
