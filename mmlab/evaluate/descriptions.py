"""Descriptions of images by a trained model, and how coherent they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from PIL import Image

from mmlab.data.dialogues import caption_of, conversations_of
from mmlab.data.progress_bar import progress
from mmlab.data.sample_types import ImageSpec, SampleError
from mmlab.data.turns import text_without_images
from mmlab.evaluate.answers import Answerer, AnswerFile, Pictures
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.questions import Question, read_picture, read_pictures
from mmlab.evaluate.scores.constant_reply import beside, variety, variety_line
from mmlab.evaluate.scores.incoherence import faults_of, finished, incoherence, words_of
from mmlab.evaluate.scores.scorers import matches
from mmlab.report.contact_sheet import BAD, GOOD, contact_sheet
from mmlab.runs.disk import write_lines

SIDE = 224
LETTERS = 300  # of a description on the sheet; the file has all of them
MOST = 0.5  # share of the images above which equal descriptions cannot be about them


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
        blind: what the model answers without the image, or None.
    """

    place: int
    key: str
    question: str
    text: str
    ended: bool
    caption: str | None
    sentence: bool = False
    blind: str | None = None


def describe(
    answerer: Answerer,
    pictures: PictureSet,
    batch_size: int,
    saved: AnswerFile | None = None,
    blind: Answerer | None = None,
) -> list[Description]:
    """A description of each image that can be used, in order; others are counted in `pictures.bad`.

    Args:
        answerer: a model whose prompt asks for captions.
        pictures: the images; the request for the n-th is drawn by n.
        batch_size: images at a time.
        saved: descriptions of an earlier start, and whether each ended; new ones are added batch by batch.
        blind: a `BlindAnswerer` that is asked the same; None: without.

    Raises:
        DataError: no image can be used, or more are bad than the budget allows.
    """
    descriptions: list[Description] = []
    starts = range(0, len(pictures), batch_size)
    for start in progress(starts, "describing images", len(starts)):
        rows: list[tuple[int, Pictures, dict[str, Any]]] = []
        for n in range(start, min(start + batch_size, len(pictures))):
            with pictures.bad.left_out(pictures.key(n)):
                files = read_pictures(pictures.index, pictures.places[n])
                if not files:
                    raise SampleError("no-picture", "It has no image.")
                shown = answerer.decode(files)
                rows.append((n, shown, pictures.sample(n).record))
        # The request does not depend on the caption, which an image need not have.
        requests = [conversations_of({"caption": "?"}, answerer.prompt, n, len(shown))[0][:1] for n, shown, _ in rows]
        earlier = {} if saved is None else saved.answers
        if earlier.keys() >= {n for n, _, _ in rows}:
            replies = [earlier[n] for n, _, _ in rows]
        else:
            replies = answerer.replies(requests, [shown for _, shown, _ in rows])
            if saved is not None:
                saved.add({n: reply for (n, _, _), reply in zip(rows, replies, strict=True)})
        without = [] if blind is None else blind.replies(requests, [shown for _, shown, _ in rows])
        unseen = {n: text for (n, *_), (text, _) in zip(rows, without, strict=False)}
        for (n, _, record), dialogue, (text, ended) in zip(rows, requests, replies, strict=True):
            question = text_without_images(dialogue[0]).strip()
            caption = caption_of(record, n, answerer.prompt.captions)
            # The caption as stored, whatever form of it a run learned: runs that are asked the same are judged the
            # same.
            sentence = answerer.prompt.template != "plain" and finished(caption_of(record, n) or "")
            about = (pictures.key(n), question, text, ended, caption, sentence, unseen.get(n))
            descriptions.append(Description(n, *about))
    if not descriptions:
        pictures.bad.refuse_all("images")
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
        The scores of `incoherence`, with `words`, `sentences` (see `in_sentences`), `exact` if there are captions,
        `replies`, see `variety`, and `unchanged`, the share of descriptions that are the same without the image.
    """
    equal = [matches(one.text, one.caption) for one in descriptions if one.caption is not None]
    words = sum(len(words_of(one.text)) for one in descriptions) / len(descriptions)
    replies = {"replies": variety([one.text for one in descriptions])}
    exact = {"exact": sum(equal) / len(equal)} if equal else {}
    same = [matches(one.text, one.blind) for one in descriptions if one.blind is not None]
    unchanged = {"unchanged": sum(same) / len(same)} if same else {}
    sentences = {"sentences": in_sentences(descriptions)}
    return {**incoherence(faults), "words": words, **sentences, **exact, **unchanged, **replies}


def description_notes(scores: dict[str, Any]) -> list[str]:
    """Lines for below the scores: the baselines of captions, and how varied the descriptions are."""
    lines = []
    if blind := scores.get("blind"):
        lines.append(f"without the images CIDEr-D is {blind['cider_d']:.4g}, a gain of {blind['gain']:+.4g}")
    if constant := scores.get("constant"):
        lines.append(f"the best constant caption has CIDEr-D {constant['cider_d']:.4g}: {constant['reply']!r}")
    if replies := scores.get("replies"):
        lines.append(variety_line(replies, scores["descriptions"]))
    if scores.get("unchanged") is not None:
        lines.append(f"{scores['unchanged']:.1%} of the descriptions stay the same without the image")
    return lines


def caption_questions(pictures: PictureSet) -> dict[int, Question]:
    """Place → the image as a question, of which all captions of its sample are right answers.

    Images without a caption are counted in `pictures.bad`.

    Raises:
        DataError: no image has a caption, or fewer have one than the budget asks for.
    """
    questions: dict[int, Question] = {}
    for n in range(len(pictures)):
        with pictures.bad.left_out(pictures.key(n)):
            questions[n] = _caption_question(pictures, n)
    if not questions:
        pictures.bad.refuse_all("captions")
    return questions


def _caption_question(pictures: PictureSet, n: int) -> Question:
    sample = pictures.sample(n)
    several = sample.record.get("captions")
    texts = several if isinstance(several, list) else [caption_of(sample.record, n)]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        raise SampleError("no-caption", "It has no caption to compare its description with.")
    return Question(pictures.places[n], sample.key, "", texts[0], "caption", tuple(texts))


def write_descriptions(folder: Path, descriptions: Sequence[Description], faults: Sequence[Sequence[str]]) -> None:
    """Write `descriptions.jsonl`, one line per image, into the folder, which is created."""
    rows = []
    for one, wrong in zip(descriptions, faults, strict=True):
        row = {"key": one.key, "question": one.question, "description": one.text, "caption": one.caption}
        rows.append({**row, "ended": one.ended, "faults": list(wrong)})
    write_lines(folder / "descriptions.jsonl", rows)


def description_sheet(
    pictures: PictureSet,
    descriptions: Sequence[Description],
    faults: Sequence[Sequence[str]],
    scores: dict[str, Any],
    cells: int = 24,
) -> Image.Image:
    """Images spread evenly over the set with their descriptions: green if coherent, else red, with the faults.

    Descriptions that do not depend on the image are red, too: one that most images have, and ones that stay the same
    without the image, if most do.
    """
    replies = scores["replies"]
    stuck = replies["commonest"] if replies["commonest_share"] > MOST and len(descriptions) > 1 else None
    blind = (scores.get("unchanged") or 0) > MOST
    faults = [
        [
            *found,
            *(["said of most images"] if stuck is not None and matches(one.text, stuck) else []),
            *(["the same without the image"] if blind and matches(one.text, one.blind or "") else []),
        ]
        for one, found in zip(descriptions, faults, strict=True)
    ]
    chosen = range(0, len(descriptions), max(1, len(descriptions) // cells))[:cells]
    spec = ImageSpec(SIDE)
    shown = [read_picture(pictures.index, pictures.places[descriptions[n].place], spec) for n in chosen]
    texts = [shorten(descriptions[n].text or "(nothing)", LETTERS, placeholder=" …") for n in chosen]
    texts = [f"{text}\n{', '.join(faults[n]) or 'coherent'}" for n, text in zip(chosen, texts, strict=True)]
    colors = [BAD if faults[n] else GOOD for n in chosen]
    title = f"{scores['incoherent']:.1%} of {scores['descriptions']:,} descriptions are incoherent; "
    title += beside("cider_d", {"questions": len(descriptions), **scores})
    return contact_sheet(shown, texts, columns=6, colors=colors, title=title)
