"""The blind baseline: what a model answers if its pictures are blank, and whether its answers depend on them at all."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mmlab.data.bad_samples import BadSamples
from mmlab.data.conversation import Segment
from mmlab.data.formats import pictures_among
from mmlab.data.images import PAD_COLOR
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import Picture
from mmlab.evaluate.answer_report import predict
from mmlab.evaluate.answers import Answerer, AnswerFile, Pictures
from mmlab.evaluate.questions import Question
from mmlab.keyed import stream


class BlindAnswerer(Answerer):
    """Asks the same model with blank pictures.

    A blank picture has the color with which LLaVA pads pictures, and takes the same places in the prompt. Without these
    places the prompt would be one that a model never saw in training, and its answers worse than a guess.

    Equal prompts get equal answers, so each is computed once.

    Args:
        answerer: asks the model with its pictures.
    """

    def __init__(self, answerer: Answerer):
        vars(self).update(vars(answerer))
        self._replies: dict[Any, tuple[str, bool]] = {}

    def complete(self, prompts: Sequence[Segment], pictures: Sequence[Pictures]) -> list[tuple[str, bool]]:
        shown = [[blank(picture) for picture in there] for there in pictures]
        keys = [
            (tuple(prompt.input_ids), *(picture.places.numpy().tobytes() for picture in there))
            for prompt, there in zip(prompts, shown, strict=True)
        ]
        places = {key: n for n, key in enumerate(keys) if key not in self._replies}
        if places:
            chosen = list(places.values())
            replies = super().complete([prompts[n] for n in chosen], [shown[n] for n in chosen])
            self._replies |= zip(places, replies, strict=True)
        return [self._replies[key] for key in keys]


def blank(picture: Picture) -> Picture:
    """A picture of the same shape without content."""
    color = torch.tensor(PAD_COLOR, dtype=picture.tiles.dtype).view(3, 1, 1)
    return replace(picture, tiles=color.expand_as(picture.tiles))


def blind_places(
    index: ShardIndex, questions: Sequence[Question], limit: int | None = None, seed: int = 0
) -> list[int]:
    """The places of questions that are also asked blind, in order.

    They are all questions about some samples with pictures, drawn by the seed.

    Args:
        index: the questions' shards.
        questions: of the evaluation.
        limit: no further sample is taken once there are so many questions; None: all.
        seed: of the draw.
    """
    samples: dict[int, list[int]] = {}
    for n, question in enumerate(questions):
        samples.setdefault(question.sample, []).append(n)
    drawn = list(samples)
    if limit is not None and limit < len(questions):
        stream(seed, "blind").shuffle(drawn)
    places: list[int] = []
    for sample in drawn:
        if limit is not None and len(places) >= limit:
            break
        if pictures_among(index.extensions(sample)):
            places += samples[sample]
    return sorted(places)


def answer_blind(
    answerer: Answerer,
    index: ShardIndex,
    questions: Sequence[Question],
    batch_size: int,
    limit: int | None = None,
    own: bool = False,
    saved: AnswerFile | None = None,
    label: str = "",
) -> dict[int, str]:
    """Place in `questions` → the answer to it with a blank picture, for `limit` questions or a few more.

    There are none for a model that reads no pictures.

    Args:
        answerer: asks the model with its pictures.
        index, questions, limit: see `blind_places`.
        batch_size, own, saved, label: as for `predict`.
    """
    if answerer.spec is None or answerer.prompt.pictures != "tokens":
        return {}
    places = blind_places(index, questions, limit)
    bad = BadSamples(index.root, len(index), 1.0)  # the same samples are counted where they are asked with pictures
    asked = [questions[n] for n in places]
    answers = predict(BlindAnswerer(answerer), index, asked, batch_size, saved, bad, own, label)
    return {n: text for n, text in zip(places, answers, strict=True) if text is not None}
