"""Questions with known answers, read from shards."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmlab.config.errors import DataError, nearest
from mmlab.data.formats import IMAGE_EXTENSIONS, parse_record
from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec, SampleError


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        sample: place of the picture's sample in the index.
        key: the sample's key.
        text, answer: the question and its right answer.
        type: kind of question that scores are split by.
    """

    sample: int
    key: str
    text: str
    answer: str
    type: str


def read_questions(index: ShardIndex, types: Sequence[str] = (), limit: int | None = None) -> list[Question]:
    """Return the questions of a set of shards in their order.

    A sample's `questions` count one each; a dialogue counts with its first question, as type `conversation`.

    Args:
        index: open shards.
        types: question types to keep; empty keeps all.
        limit: at most this many.

    Raises:
        DataError: there is no question (of these types).
    """
    found: list[Question] = []
    seen: set[str] = set()
    for i in range(len(index)):
        for question in _questions(i, str(index.keys[i]), index):
            seen.add(question.type)
            if not types or question.type in types:
                found.append(question)
        if limit is not None and len(found) >= limit:
            return found[:limit]
    if not found:
        wrong = [name for name in types if name not in seen]
        has = (
            f"its types are {', '.join(sorted(seen))}.{nearest(wrong[0], seen) if wrong else ''}"
            if seen
            else "it has none."
        )
        raise DataError(f"{index.root} holds no question{' of type ' + ', '.join(types) if types else ''}; {has}")
    return found


def _questions(i: int, key: str, index: ShardIndex) -> Iterator[Question]:
    try:
        record = parse_record(index.read(i, ("json", "txt")))
    except (SampleError, ValueError) as error:
        raise DataError(f"{index.root}: the record of sample {key} cannot be read: {error}") from error
    if record.get("questions"):
        for item in record["questions"]:
            yield Question(i, key, item["question"], item["answer"], item.get("type", "question"))
        return
    turns = record.get("conversations") or []
    if len(turns) > 1:
        yield Question(i, key, turns[0]["value"].replace("<image>", "").strip(), turns[1]["value"], "conversation")


def read_picture(index: ShardIndex, i: int, spec: ImageSpec):
    """Return sample i's picture as uint8 `[3, H, W]`, or None if it has none.

    Raises:
        DataError: the picture cannot be decoded.
    """
    try:
        members = index.read(i, IMAGE_EXTENSIONS)
        data = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
        return None if data is None else decode_image(data, spec)
    except SampleError as error:
        raise DataError(f"{index.root}: the picture of sample {index.keys[i]} cannot be read: {error}") from error


class BlindAnswers:
    """Answers without looking: the commonest answer to the same question in the training set.

    A question that was never asked there gets the commonest answer to any question. What a model scores
    above this is what it has seen.

    Args:
        questions: of the training set.
    """

    def __init__(self, questions: Sequence[Question]):
        by_text: dict[str, Counter[str]] = {}
        for question in questions:
            by_text.setdefault(question.text, Counter())[question.answer] += 1
        self.known = {text: answers.most_common(1)[0][0] for text, answers in by_text.items()}
        self.default = Counter(question.answer for question in questions).most_common(1)[0][0]

    def __call__(self, question: Question) -> str:
        return self.known.get(question.text, self.default)
