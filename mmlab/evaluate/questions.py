"""Questions with right answers, read from shards."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmlab.config.errors import DataError, nearest
from mmlab.data.formats import IMAGE_EXTENSIONS, parse_record
from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec, SampleError
from mmlab.evaluate.scores.score_table import Reference, texts_of


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        sample: place of the image's sample in the index.
        key: the sample's key.
        text, answer: the question and its right answer.
        type: type of question, by which scores are split.
        answers: all right answers, if there are several, or if they differ from what a model learns to say.
        types: the types, if it has several.
        choices: number of letters to choose from.
    """

    sample: int
    key: str
    text: str
    answer: str
    type: str
    answers: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    choices: int = 0

    @property
    def reference(self) -> Reference:
        """The right answers, for a scorer."""
        return Reference(self.key, self.answers or (self.answer,), self.types or (self.type,), self.key, self.choices)


def read_questions(index: ShardIndex, types: Sequence[str] = (), limit: int | None = None) -> list[Question]:
    """The questions of a set of shards in their order.

    Every one of a sample's `questions` counts; of a dialogue only its first question, as type `conversation`. A
    question may have `answers`, `types` and `choices` besides its answer; for a dialogue they are in the record's
    `reference`.

    Args:
        index: open shards.
        types: question types to read; empty: all.
        limit: at most this many.

    Raises:
        DataError: there is no question (of these types).
    """
    questions: list[Question] = []
    seen: set[str] = set()
    for i in range(len(index)):
        for question in _questions(i, str(index.keys[i]), index):
            kinds = question.types or (question.type,)
            seen.update(kinds)
            if not types or not set(types).isdisjoint(kinds):
                questions.append(question)
        if limit is not None and len(questions) >= limit:
            return questions[:limit]
    if not questions:
        wrong = [name for name in types if name not in seen]
        has = (
            f"its types are {', '.join(sorted(seen))}.{nearest(wrong[0], seen) if wrong else ''}"
            if seen
            else "it has none."
        )
        raise DataError(f"{index.root} has no question{' of type ' + ', '.join(types) if types else ''}; {has}")
    return questions


def _questions(i: int, key: str, index: ShardIndex) -> Iterator[Question]:
    try:
        record = parse_record(index.read(i, ("json", "txt")))
    except (SampleError, ValueError) as error:
        raise DataError(f"{index.root}: the record of sample {key} cannot be read: {error}") from error
    try:
        yield from _asked(i, key, record)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{index.root}: sample {key} has a malformed question or reference: {error!r}.") from error


def _asked(i: int, key: str, record: dict[str, Any]) -> Iterator[Question]:
    turns = record.get("conversations") or []
    if record.get("questions"):
        for item in record["questions"]:
            kind = item.get("type", "question")
            yield Question(i, key, item["question"], item["answer"], kind, *_reference(item))
    elif len(turns) > 1:
        text = turns[0]["value"].replace("<image>", "").strip()
        yield Question(i, key, text, turns[1]["value"], "conversation", *_reference(record.get("reference") or {}))


def _reference(item: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """The `answers`, `types` and `choices` of a question or a record's reference."""
    return texts_of(item, "answers"), texts_of(item, "types"), int(item.get("choices", 0))


def read_picture(index: ShardIndex, i: int, spec: ImageSpec):
    """Sample i's image as uint8 `[3, H, W]`, or None if it has none.

    Raises:
        DataError: the image cannot be decoded.
    """
    try:
        members = index.read(i, IMAGE_EXTENSIONS)
        data = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
        return None if data is None else decode_image(data, spec)
    except SampleError as error:
        raise DataError(f"{index.root}: the image of sample {index.keys[i]} cannot be read: {error}") from error


class BlindAnswers:
    """A baseline without images: the most frequent answer to the same question in the training set.

    A question that does not occur there gets the most frequent answer to any question.

    Args:
        questions: of the training set.
    """

    def __init__(self, questions: Sequence[Question]):
        by_text: dict[str, Counter[str]] = {}
        for question in questions:
            by_text.setdefault(question.text, Counter())[question.answer] += 1
        self.answers = {text: answers.most_common(1)[0][0] for text, answers in by_text.items()}
        self.default = Counter(question.answer for question in questions).most_common(1)[0][0]

    def __call__(self, question: Question) -> str:
        return self.answers.get(question.text, self.default)
