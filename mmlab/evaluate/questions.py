"""Questions with right answers, read from shards."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmlab.config.errors import DataError, nearest
from mmlab.data.bad_samples import BadSamples
from mmlab.data.config import Prompt
from mmlab.data.dialogues import caption_of, conversations_of
from mmlab.data.formats import parse_record, pictures_among, record_type
from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec, SampleError
from mmlab.data.turns import Dialogue, text_without_images
from mmlab.evaluate.scores.score_table import UNTYPED, Reference, texts_of

_PROMPTS = {part: Prompt(turns=part) for part in ("questions", "conversations")}


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        sample: place of the image's sample in the index.
        key: the sample's key.
        text, answer: the question and its right answer. The marker of a single picture that opens the dialogue is left
            out; others stand in the text.
        type: type of question, by which scores are split.
        answers: all right answers, if there are several, or if they differ from what a model learns to say.
        types: the types, if it has several.
        choices: number of letters to choose from.
        earlier: the questions and right answers before it in its dialogue.
        images: number of pictures that each question of the dialogue, up to this one, marks in its text; empty: the
            dialogue shows none, or a single one that opens it.
        system: the dialogue's own system message, if it has one.
        caption: of the record, which a language model may read in place of the picture.
    """

    sample: int
    key: str
    text: str
    answer: str
    type: str
    answers: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    choices: int = 0
    earlier: tuple[tuple[str, str], ...] = ()
    images: tuple[int, ...] = ()
    system: str | None = None
    caption: str | None = None

    @property
    def reference(self) -> Reference:
        """The right answers, for a scorer."""
        return Reference(self.key, self.answers or (self.answer,), self.types or (self.type,), self.key, self.choices)


def read_questions(
    index: ShardIndex, types: Sequence[str] = (), limit: int | None = None, bad: BadSamples | None = None
) -> list[Question]:
    """The questions of a set of shards in their order.

    They are what training would learn to answer: every one of a sample's `questions` with its `follow_ups`, or else
    every question of its dialogue. The type of a question is its own, or else that of the record, or else `UNTYPED`. A
    question may have `answers`, `types` and `choices` besides its answer; for the first question of a dialogue they are
    in the record's `reference`.

    Args:
        index: open shards.
        types: question types to read; empty: all.
        limit: at most this many.
        bad: where samples are counted whose questions training would refuse.

    Raises:
        DataError: there is no question (of these types), or there are more bad samples than the budget allows.
    """
    bad = BadSamples(index.root, len(index)) if bad is None else bad
    questions: list[Question] = []
    seen: set[str] = set()
    for i in range(len(index)):
        asked: list[Question] = []
        with bad.left_out(str(index.keys[i])):
            asked = _questions(index, i)
        for question in asked:
            kinds = question.types or (question.type,)
            seen.update(kinds)
            if not types or not set(types).isdisjoint(kinds):
                questions.append(question)
        if limit is not None and len(questions) >= limit:
            return questions[:limit]
    if not questions and bad:
        bad.refuse_all("questions")
    if not questions:
        wrong = [name for name in types if name not in seen]
        names = ", ".join(sorted(seen, key=lambda name: (name == UNTYPED, name)))
        has = f"its types are {names}.{nearest(wrong[0], seen) if wrong else ''}" if seen else "it has none."
        raise DataError(f"{index.root} has no question{' of type ' + ', '.join(types) if types else ''}; {has}")
    return questions


def _questions(index: ShardIndex, i: int) -> list[Question]:
    """The questions of sample `i`; raises SampleError for a record that training would refuse."""
    record = parse_record(index.read(i, ("json", "txt")))
    pictures = len(pictures_among(index.extensions(i)))
    part = next((part for part in _PROMPTS if record.get(part)), None)
    if part is None:
        return []
    dialogues = conversations_of(record, _PROMPTS[part], 0, pictures)
    key, kind = str(index.keys[i]), record_type(record)
    if part == "questions":
        listed = [(one, record_type(one) or kind or UNTYPED) for one in record["questions"]]
    else:
        listed = [(record.get("reference") or {}, kind or UNTYPED)]
    caption = caption_of(record, 0)
    return [
        replace(question, caption=caption)
        for dialogue, (about, type) in zip(dialogues, listed, strict=True)
        for question in _asked(dialogue, i, key, type, _reference(about))
    ]


def _asked(dialogue: Dialogue, i: int, key: str, type: str, reference: Any) -> Iterator[Question]:
    """The questions of one dialogue; the reference is that of the first."""
    texts, images = [turn.text for turn in dialogue], tuple(turn.images for turn in dialogue[::2])
    alone = sum(images) == images[0] <= 1  # the picture that opens the dialogue
    texts[0] = text_without_images(dialogue[0]).strip() if alone else texts[0]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    for n, (text, answer) in enumerate(pairs):
        own: Any = reference if n == 0 else ((), (), 0)
        history: Any = {"earlier": tuple(pairs[:n]), "images": () if alone else images[: n + 1]}
        yield Question(i, key, text, answer, type, *own, **history, system=dialogue[0].system)


def _reference(item: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """The `answers`, `types` and `choices` of a question or a record's reference."""
    try:
        return texts_of(item, "answers"), texts_of(item, "types"), int(item.get("choices", 0))
    except (AttributeError, TypeError, ValueError) as error:
        raise SampleError("reference", f"The reference of a question is malformed: {error}.") from error


def read_picture(index: ShardIndex, i: int, spec: ImageSpec):
    """Sample i's first picture as uint8 `[3, H, W]`, or None if it has none.

    Raises:
        SampleError: the picture cannot be decoded.
    """
    names = pictures_among(index.extensions(i))[:1]
    return decode_image(index.read(i, names)[names[0]], spec) if names else None


def read_pictures(index: ShardIndex, i: int) -> list[bytes]:
    """The files of sample i's pictures, in order."""
    names = pictures_among(index.extensions(i))
    members = index.read(i, names)
    return [members[name] for name in names]


class CommonestAnswers:
    """A baseline from the question alone: the most frequent answer to the same question in the training set.

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
