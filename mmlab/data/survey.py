"""What a set of shards holds, counted for the choice of a recipe: pictures, captions, questions and their lengths."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mmlab.data.bad_samples import BadSamples
from mmlab.data.class_texts import class_name
from mmlab.data.dialogues import caption_of
from mmlab.data.formats import parse_record, pictures_among, record_texts
from mmlab.data.index import ShardIndex
from mmlab.data.progress_bar import progress
from mmlab.data.record_turns import turns_of, used_turns


@dataclass(frozen=True)
class Survey:
    """Counts of a set of shards; texts are measured in characters.

    Attributes:
        samples: how many there are.
        pictures: samples with a picture.
        side: median of the longer sides of the (first) pictures in pixels; 0 without pictures.
        square: whether all of these pictures are square.
        several: the most pictures of a sample.
        captions: samples with a picture and a caption.
        caption_answers: those whose caption is also the answer to one of their questions.
        questions: questions with an answer, the later turns of dialogues included.
        longest: 99th percentile of the characters of a dialogue or caption; 0 without either.
        words: different words and numbers that occur at least twice.
        classes: different classes; 0 if no sample has one.
    """

    samples: int
    pictures: int
    side: int
    square: bool
    several: int
    captions: int
    caption_answers: int
    questions: int
    longest: int
    words: int
    classes: int


def survey(index: ShardIndex) -> Survey:
    """Count what a set of shards holds; samples that training would leave out may be counted, too.

    Raises:
        DataError: more records cannot be read than the budget allows.
    """
    bad = BadSamples(index.root, len(index))
    pictures = captions = caption_answers = questions = several = 0
    words: Counter[str] = Counter()
    lengths, classes = [], set()
    for i in progress(range(len(index)), "reading records", len(index)):
        with bad.left_out(str(index.keys[i])):
            members = index.read(i, ("json", "txt", "cls"))
            record = parse_record(members)
            count = len(pictures_among(index.extensions(i)))
            caption = caption_of(record, 0)
            pictures, several = pictures + bool(count), max(several, count)
            captions += bool(count and caption)
            lengths += [len(caption)] if caption else []
            dialogues = list(_dialogues(record))
            caption_answers += any(caption == answer for dialogue in dialogues for _, answer in dialogue)
            for dialogue in dialogues:
                lengths.append(sum(len(question) + len(answer) for question, answer in dialogue))
                questions += len(dialogue)
            for text in record_texts(record):
                words.update(re.findall(r"\w+", text.lower()))
            if (name := class_name(record, members)) is not None:
                classes.add(name)
    sizes = index.joined("image_sizes")
    width, height = sizes[sizes[:, 0] > 0].T
    return Survey(
        samples=len(index),
        pictures=pictures,
        side=int(np.median(np.maximum(width, height))) if len(width) else 0,
        square=bool((width == height).all()),
        several=several,
        captions=captions,
        caption_answers=caption_answers,
        questions=questions,
        longest=int(np.percentile(lengths, 99)) if lengths else 0,
        words=sum(count > 1 for count in words.values()),
        classes=len(classes),
    )


def _dialogues(record: dict[str, Any]) -> Iterator[list[tuple[str, str]]]:
    """The questions and answers of each of a record's dialogues, whose order and texts are not checked."""
    dialogues = [turns_of(one) for one in record.get("questions") or []]
    dialogues.append(used_turns(record.get("conversations") or []))
    for turns in dialogues:
        pairs = [
            (str(one.get("value", "")), str(two.get("value", "")))
            for one, two in pairwise(turns)
            if (one.get("from"), two.get("from")) == ("human", "gpt")
        ]
        if pairs:
            yield pairs
