"""Descriptions of images by a trained model, and how coherent they are."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from PIL import Image

from mmlab.config.errors import DataError
from mmlab.data.dialogues import caption_of, conversations_of
from mmlab.data.progress_bar import progress
from mmlab.data.sample_types import ImageSpec
from mmlab.data.turns import IMAGE
from mmlab.evaluate.answers import Answerer, AnswerFile
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.questions import Question, read_picture
from mmlab.evaluate.scores.incoherence import faults_of, finished, incoherence, words_of
from mmlab.evaluate.scores.scorers import matches
from mmlab.report.contact_sheet import BAD, GOOD, contact_sheet

SIDE = 224
LETTERS = 300  # of a description on the sheet; the file has all of them


@dataclass(frozen=True)
class Description:
    """One image's description.

    Attributes:
        place: place of the image in its set.
        key: key of its sample.
        question: the question to the model; empty if the image alone is the prompt.
        text: the model's answer.
        ended: whether it was finished rather than cut off.
        caption: the sample's own caption in the form that the run learned, or None.
        sentence: whether the model was asked, and the sample's caption as stored ends with a full stop.
    """

    place: int
    key: str
    question: str
    text: str
    ended: bool
    caption: str | None
    sentence: bool = False


def describe(
    answerer: Answerer, pictures: PictureSet, batch_size: int, saved: AnswerFile | None = None
) -> list[Description]:
    """A description of each image, in order.

    Args:
        answerer: a model whose prompt asks for captions.
        pictures: the images; the request for the n-th is drawn by n.
        batch_size: images at a time.
        saved: descriptions of an earlier start, and whether each ended; new ones are added batch by batch.

    Raises:
        DataError: a sample without a readable image or record.
    """
    descriptions: list[Description] = []
    starts = range(0, len(pictures), batch_size)
    for start in progress(starts, "describing images", len(starts)):
        places = range(start, min(start + batch_size, len(pictures)))
        records = [pictures.sample(n).record for n in places]
        captions = [caption_of(record, n, answerer.prompt.captions) for n, record in zip(places, records, strict=True)]
        # Captions as stored, whatever form of them a run learned: runs that are asked the same are judged the same.
        asks = answerer.prompt.template != "plain"
        whole = [asks and finished(caption_of(record, n) or "") for n, record in zip(places, records, strict=True)]
        # The request does not depend on the caption, which an image need not have.
        requests = [conversations_of({"caption": "?"}, answerer.prompt, n)[0][:1] for n in places]
        earlier = {} if saved is None else saved.answers
        if earlier.keys() >= set(places):
            replies = [earlier[n] for n in places]
        else:
            replies = answerer.replies(requests, [pictures.picture(n) for n in places])
            if saved is not None:
                saved.add(dict(zip(places, replies, strict=True)))
        rows = zip(places, captions, whole, requests, replies, strict=True)
        for n, caption, sentence, dialogue, (text, ended) in rows:
            question = dialogue[0].text.removeprefix(IMAGE).strip()
            descriptions.append(Description(n, pictures.key(n), question, text, ended, caption, sentence))
    return descriptions


def in_sentences(descriptions: Sequence[Description]) -> bool:
    """Whether descriptions have to end with a full stop, as most captions do."""
    sentences = [one.sentence for one in descriptions if one.caption is not None]
    return sum(sentences) * 2 > len(sentences)


def judge(descriptions: Sequence[Description]) -> list[list[str]]:
    """The faults of each description."""
    sentences = in_sentences(descriptions)
    return [faults_of(one.text, one.ended, sentences) for one in descriptions]


def description_scores(descriptions: Sequence[Description], faults: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Shares of incoherent descriptions, mean length, and the share of descriptions that equal the caption.

    Returns:
        The scores of `incoherence`, with `words`, `sentences` (see `in_sentences`), and `exact` if there are captions.
    """
    equal = [matches(one.text, one.caption) for one in descriptions if one.caption is not None]
    words = sum(len(words_of(one.text)) for one in descriptions) / len(descriptions)
    exact = {"exact": sum(equal) / len(equal)} if equal else {}
    return {**incoherence(faults), "words": words, "sentences": in_sentences(descriptions), **exact}


def caption_questions(pictures: PictureSet) -> list[Question]:
    """Each image as a question, of which all captions of its sample are right answers.

    Raises:
        DataError: a sample without a caption.
    """
    return [_caption_question(pictures, n) for n in range(len(pictures))]


def _caption_question(pictures: PictureSet, n: int) -> Question:
    sample = pictures.sample(n)
    several = sample.record.get("captions")
    texts = several if isinstance(several, list) else [caption_of(sample.record, n)]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        raise DataError(f"{sample.source}: sample {sample.key} has no caption to compare its description with.")
    return Question(pictures.places[n], sample.key, "", texts[0], "caption", tuple(texts))


def write_descriptions(folder: Path, descriptions: Sequence[Description], faults: Sequence[Sequence[str]]) -> None:
    """Write `descriptions.jsonl`, one line per image, into the folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "descriptions.jsonl").open("w", encoding="utf-8") as lines:
        for one, wrong in zip(descriptions, faults, strict=True):
            row = {"key": one.key, "question": one.question, "description": one.text, "caption": one.caption}
            lines.write(json.dumps({**row, "ended": one.ended, "faults": list(wrong)}) + "\n")


def description_sheet(
    pictures: PictureSet,
    descriptions: Sequence[Description],
    faults: Sequence[Sequence[str]],
    scores: dict[str, Any],
    cells: int = 24,
) -> Image.Image:
    """Images spread evenly over the set with their descriptions: green if coherent, else red, with the faults."""
    chosen = range(0, len(descriptions), max(1, len(descriptions) // cells))[:cells]
    spec = ImageSpec(SIDE)
    shown = [read_picture(pictures.index, pictures.places[descriptions[n].place], spec) for n in chosen]
    texts = [shorten(descriptions[n].text or "(nothing)", LETTERS, placeholder=" …") for n in chosen]
    texts = [f"{text}\n{', '.join(faults[n]) or 'coherent'}" for n, text in zip(chosen, texts, strict=True)]
    colors = [BAD if faults[n] else GOOD for n in chosen]
    title = f"{scores['incoherent']:.1%} of {scores['descriptions']:,} descriptions are incoherent"
    return contact_sheet(shown, texts, columns=6, colors=colors, title=title)
