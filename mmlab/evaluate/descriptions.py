"""What a model says when it is asked to describe pictures, and how coherent that is."""

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
from mmlab.data.sample import ImageSpec
from mmlab.data.turns import IMAGE
from mmlab.evaluate.answers import Answerer, KeptAnswers
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.questions import Question, read_picture
from mmlab.evaluate.scores.incoherence import faults, finished, incoherence, words_of
from mmlab.evaluate.scores.scorers import matches
from mmlab.report.sheet import BAD, GOOD, contact_sheet

SIDE = 224
LETTERS = 300  # of a description on the sheet; the file has all


@dataclass(frozen=True)
class Description:
    """One picture's description.

    Attributes:
        place: of the picture in its set.
        key: of its sample.
        question: what the model was asked; empty where the picture alone asks.
        text: what it said.
        ended: whether it ended by itself.
        caption: the sample's own, in the form that the run learned, or None.
        sentence: whether it was asked for a text like the sample's caption as it lies, and that ends with a full stop.
    """

    place: int
    key: str
    question: str
    text: str
    ended: bool
    caption: str | None
    sentence: bool = False


def describe(
    answerer: Answerer, pictures: PictureSet, batch_size: int, kept: KeptAnswers | None = None
) -> list[Description]:
    """A description of each picture, in order.

    Args:
        answerer: its prompt asks for captions.
        pictures: the request for the n-th is drawn by n.
        batch_size: pictures at a time.
        kept: descriptions of an earlier start, and whether each ended; new ones are added batch by batch.

    Raises:
        DataError: a sample without a readable picture or record.
    """
    found: list[Description] = []
    starts = range(0, len(pictures), batch_size)
    for start in progress(starts, "describing pictures", len(starts)):
        places = range(start, min(start + batch_size, len(pictures)))
        records = [pictures.sample(n).record for n in places]
        captions = [caption_of(record, n, answerer.prompt.captions) for n, record in zip(places, records, strict=True)]
        # Whatever form a run learned its captions in: runs that are asked the same are judged the same.
        asks = answerer.prompt.template != "plain"
        whole = [asks and finished(caption_of(record, n) or "") for n, record in zip(places, records, strict=True)]
        # The request does not depend on the caption, which a picture to be described need not have.
        asked = [conversations_of({"caption": "?"}, answerer.prompt, n)[0][:1] for n in places]
        known = {} if kept is None else kept.known
        if known.keys() >= set(places):
            replies = [known[n] for n in places]
        else:
            replies = answerer.replies(asked, [pictures.picture(n) for n in places])
            if kept is not None:
                kept.add(dict(zip(places, replies, strict=True)))
        for n, caption, sentence, dialogue, (text, ended) in zip(places, captions, whole, asked, replies, strict=True):
            question = dialogue[0].text.removeprefix(IMAGE).strip()
            found.append(Description(n, pictures.key(n), question, text, ended, caption, sentence))
    return found


def in_sentences(descriptions: Sequence[Description]) -> bool:
    """Whether a description has to end with a full stop: most captions do."""
    known = [one.sentence for one in descriptions if one.caption is not None]
    return sum(known) * 2 > len(known)


def judge(descriptions: Sequence[Description]) -> list[list[str]]:
    """The faults of each description."""
    sentences = in_sentences(descriptions)
    return [faults(one.text, one.ended, sentences) for one in descriptions]


def description_scores(descriptions: Sequence[Description], found: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Shares of incoherent descriptions, their mean length, and the share that equals the caption.

    Returns:
        As `incoherence`, with `words`, `sentences` (see `in_sentences`), and `exact` where there are captions.
    """
    known = [matches(one.text, one.caption) for one in descriptions if one.caption is not None]
    words = sum(len(words_of(one.text)) for one in descriptions) / len(descriptions)
    exact = {"exact": sum(known) / len(known)} if known else {}
    return {**incoherence(found), "words": words, "sentences": in_sentences(descriptions), **exact}


def caption_questions(pictures: PictureSet) -> list[Question]:
    """Each picture as a question that all the captions of its sample answer.

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
        raise DataError(f"{sample.source}: sample {sample.key} has no caption to compare a description with.")
    return Question(pictures.places[n], sample.key, "", texts[0], "caption", tuple(texts))


def write_descriptions(folder: Path, descriptions: Sequence[Description], found: Sequence[Sequence[str]]) -> None:
    """Write `descriptions.jsonl`, one line a picture, into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "descriptions.jsonl").open("w", encoding="utf-8") as lines:
        for one, wrong in zip(descriptions, found, strict=True):
            row = {"key": one.key, "question": one.question, "description": one.text, "caption": one.caption}
            lines.write(json.dumps({**row, "ended": one.ended, "faults": list(wrong)}) + "\n")


def description_sheet(
    pictures: PictureSet,
    descriptions: Sequence[Description],
    found: Sequence[Sequence[str]],
    scores: dict[str, Any],
    cells: int = 24,
) -> Image.Image:
    """Pictures spread evenly over the set with what was said of them; green where coherent, red with the faults."""
    chosen = range(0, len(descriptions), max(1, len(descriptions) // cells))[:cells]
    spec = ImageSpec(SIDE)
    shown = [read_picture(pictures.index, pictures.places[descriptions[n].place], spec) for n in chosen]
    said = [shorten(descriptions[n].text or "(nothing)", LETTERS, placeholder=" …") for n in chosen]
    texts = [f"{text}\n{', '.join(found[n]) or 'coherent'}" for n, text in zip(chosen, said, strict=True)]
    colours = [BAD if found[n] else GOOD for n in chosen]
    title = f"{scores['incoherent']:.1%} of {scores['descriptions']:,} descriptions are incoherent"
    return contact_sheet(shown, texts, columns=6, colours=colours, title=title)
