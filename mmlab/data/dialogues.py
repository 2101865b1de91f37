"""From a record in the shards' canonical form to dialogues with pictures in place."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from mmlab.data.config import Prompt
from mmlab.data.formats import check_record
from mmlab.data.record_turns import listed_in, read_question, read_turns, turns_of
from mmlab.data.sample_types import SampleError
from mmlab.data.turns import IMAGE, Dialogue, Turn
from mmlab.keyed import choose

BRIEF_DESCRIPTION = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
"""LLaVA's stage 1 asks for a caption with one of these (arXiv 2304.08485, table 11)."""

DETAILED_DESCRIPTION = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
"""MiniGPT-4's stage 2 asks for a description with one of these (its repository, prompts/alignment.txt)."""

REQUESTS = {"llava": BRIEF_DESCRIPTION, "minigpt4": DETAILED_DESCRIPTION}
BLIP_WORDS = 50  # longest caption in words (LAVIS and MiniGPT-4, processors/blip_processors.py)

_MARKS = re.compile(r'[.!"()*#:;~]')


def caption_of(record: dict[str, Any], seed: int, form: str = "raw") -> str | None:
    """The record's caption, of several `captions` the one drawn by `seed`, or None.

    Args:
        record: canonical record.
        seed: of the sample.
        form: `raw` or `blip`, see `Prompt.captions`.
    """
    captions = record.get("captions")
    listed = captions if isinstance(captions, list) else []
    texts = [text for text in listed if isinstance(text, str) and text.strip()]
    caption = choose(texts, seed, "caption") if texts else record.get("caption")
    caption = _formatted(caption, form) if isinstance(caption, str) else ""
    return caption if caption.strip() else None


def caption_for(record: dict[str, Any], prompt: Prompt, seed: int) -> str:
    """The caption of a record in the form that the prompt has.

    Args:
        record: canonical record; without a caption, template `plain` takes its conversation's last answer, or that of
            one of its questions, drawn by `seed`.
        prompt: template, and form of captions.
        seed: of the sample.

    Raises:
        SampleError: `no-caption`.
    """
    caption = caption_of(record, seed, prompt.captions)
    if caption is None and prompt.template == "plain":
        return _last_answer(record, prompt.captions, seed)
    if caption is None:
        raise SampleError("no-caption", "The record has no caption.")
    return caption


def _formatted(caption: str, form: str) -> str:
    return caption if form == "raw" else " ".join(_MARKS.sub(" ", caption.lower()).split()[:BLIP_WORDS])


def conversations_of(record: dict[str, Any], prompt: Prompt, seed: int, pictures: int = 1) -> list[Dialogue]:
    """The dialogues of a record, with `<image>` in human turns where its pictures are shown (`Turn.images`).

    A single picture opens the turn that marks it, as in LLaVA's code (`preprocess_multimodal`), or else the first one,
    followed by a line break. Several stand where the turns mark them, as often as there are pictures; if none is
    marked, all of them open the first turn.

    Args:
        record: canonical record.
        prompt: which part of it is used, and what stands for the image.
        seed: of the sample; draws a caption and the request for it.
        pictures: number of the sample's pictures that the model is shown.

    Raises:
        SampleError: `no-caption`, `no-answer`, `empty-answer`, `empty-question`, `order`, `role`, `pictures` (more or
            fewer are marked), `no-picture`, or `turns` for a malformed list.
    """
    if prompt.template == "plain":
        caption = caption_for(record, prompt, seed)
        shown = {"scattered": 1, "tokens": pictures}.get(prompt.pictures, 0)
        return [[Turn("human", IMAGE * shown, images=shown), Turn("gpt", caption)]]
    return [
        _place(dialogue, record, prompt, seed, pictures, marked, kind != "conversations")
        for kind in kinds_of(record, prompt.turns, seed)
        for marked, dialogue in _dialogues(kind, record, prompt, seed, pictures)
    ]


@cache
def _every(turns: str) -> Prompt:
    return Prompt(turns=turns)


def check_sample(record: dict[str, Any], parts: Sequence[str], pictures: int) -> dict[str, Any]:
    """Return a record if training can use it, whatever the prompt; converters check what they write with this.

    Args:
        record: canonical record.
        parts: of it that must be usable: `conversations`, `questions`, `caption`.
        pictures: number of the sample's pictures.

    Raises:
        SampleError: as `check_record` and `conversations_of`.
    """
    check_record(record)
    for part in parts:
        conversations_of(record, _every(part), 0, pictures)
    return record


def kinds_of(record: dict[str, Any], turns: str, seed: int) -> list[str]:
    """The parts of the record to use, in order."""
    if turns not in ("auto", "every"):
        return [turns]
    has = {
        "questions": bool(record.get("questions")),
        "conversations": bool(record.get("conversations")),
        "caption": caption_of(record, seed) is not None,
    }
    kinds = [kind for kind, there in has.items() if there] or ["caption"]
    return kinds if turns == "every" else kinds[:1]


def _dialogues(
    kind: str, record: dict[str, Any], prompt: Prompt, seed: int, pictures: int
) -> list[tuple[int | None, Dialogue]]:
    """Each dialogue of one part of the record, as `read_turns` gives it."""
    if kind == "questions":
        return [read_question(item, pictures) for item in listed_in(record, "questions")]
    if kind == "conversations":
        return [read_turns(listed_in(record, "conversations"), pictures)]
    caption = caption_for(record, prompt, seed)
    return [(None, [Turn("human", choose(REQUESTS[prompt.requests], seed, "question")), Turn("gpt", caption)])]


def _place(
    dialogue: Dialogue,
    record: dict[str, Any],
    prompt: Prompt,
    seed: int,
    pictures: int,
    marked: int | None,
    about: bool,
) -> Dialogue:
    """Put the image markers, a caption or nothing before a question.

    Args:
        dialogue: without the marker, or with the markers of several pictures in place.
        record, prompt, seed, pictures: as for `conversations_of`.
        marked: the turn that has the marker, if one has.
        about: whether it is about a picture even without a marker.
    """
    at, opening, shown = marked or 0, "", 0
    if any(turn.images for turn in dialogue):
        pass  # several pictures are in place
    elif prompt.pictures == "tokens":
        if marked is not None and not pictures:
            raise SampleError("no-picture", "The conversation marks an image, but the sample has none.")
        opening, shown = "\n".join([IMAGE] * pictures), pictures
    elif prompt.pictures in ("text", "scattered") and (marked is not None or pictures or about):
        caption = caption_for(record, prompt, seed)
        opening, shown = (caption, 0) if prompt.pictures == "text" else (IMAGE, 1)
    for n, turn in enumerate(dialogue):
        if turn.role == "human" and not turn.text.strip() and not (n == at and opening):
            later = "A later question is empty." if n else "A question without an image is empty."
            raise SampleError("empty-question", later)
    if not opening:
        return dialogue
    text = dialogue[at].text
    opened = replace(dialogue[at], text=f"{opening}\n{text}" if text else opening, images=shown)
    return [*dialogue[:at], opened, *dialogue[at + 1 :]]


def _last_answer(record: dict[str, Any], form: str, seed: int) -> str:
    """The caption of a record in LLaVA's pretraining form: its last gpt turn."""
    turns = record.get("conversations") or []
    questions = [item for item in record.get("questions") or [] if isinstance(item, dict)]
    if not turns and questions:
        turns = turns_of(choose(questions, seed, "caption"))
    answers = [t.get("value") for t in turns if isinstance(t, dict) and t.get("from") == "gpt"]
    last = _formatted(answers[-1], form) if answers and isinstance(answers[-1], str) else ""
    if not last.strip():
        raise SampleError("no-caption", "The record has neither a caption nor a conversation that ends with one.")
    return last
