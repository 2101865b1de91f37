"""A visitor's chat with one or more runs: the same questions to all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL.Image import Image

from mmlab.data.bad_samples import sample_errors
from mmlab.data.config import Prompt
from mmlab.data.images import decoding, load_rgb
from mmlab.data.sample_types import Picture, SampleError
from mmlab.data.turns import Dialogue, Turn
from mmlab.demo.visits import Visit
from mmlab.evaluate.answers import Answerer
from mmlab.evaluate.streamed_answer import streamed_answer

SHOWN_SIDE = 768
"""Pixels of the longest side of a picture in the chat; the models read the uploaded one."""


@dataclass(frozen=True)
class Speaker:
    """A run that answers.

    Attributes:
        name: of the run.
        model: in eval mode, on its device.
        prompt: for questions.
        data: settings of the data that it was trained on.
    """

    name: str
    model: Any
    prompt: Prompt
    data: Any

    @property
    def sees(self) -> bool:
        """Whether it reads pictures."""
        return hasattr(self.model, "vision")

    def answerer(self, max_new_tokens: int, temperature: float) -> Answerer:
        return Answerer(self.model, self.prompt, self.data, max_new_tokens, temperature)


@dataclass
class Talk:
    """The dialogue of one visitor with one run.

    Attributes:
        dialogue: turns so far; the last one is a question only while it is answered.
        pictures: that its questions show, as the run's model reads them.
    """

    dialogue: Dialogue = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass
class TalkVisit(Visit):
    """A visitor's chat.

    Attributes:
        talks: one for each run.
        asked: each question as it was written, and the files of its pictures on the page.
    """

    talks: list[Talk] = field(default_factory=list)
    asked: list[tuple[str, list[Path]]] = field(default_factory=list)

    def ask(self, answerers: Sequence[Answerer], question: str, files: Sequence[tuple[str, bytes]]) -> None:
        """Add a question for all runs; it is not answered yet.

        Args:
            answerers: of the runs.
            question: with or without marks of the pictures.
            files: name and bytes of each picture that comes with it.

        Raises:
            SampleError: a file that is no picture, or a question that cannot be asked; nothing has changed.
        """
        shown = [picture_in(*file) for file in files]
        asked = []
        for answerer, talk in zip(answerers, self.talks, strict=True):
            pictures = answerer.decode([data for _, data in files])
            if len(pictures) < len(files):
                raise SampleError("pictures", "a run that reads no pictures would answer without them.")
            # Pictures of a later question open it, as those of a first one do.
            turns = [*talk.dialogue, *answerer.ask(question, len(pictures))]
            asked.append(Talk(turns, [*talk.pictures, *pictures]))
            with sample_errors():
                answerer.tokens(turns, asked[-1].pictures)
        self.talks = asked
        self.asked.append((question, [self.place(".png") for _ in shown]))
        for picture, place in zip(shown, self.asked[-1][1], strict=True):
            picture.save(place)

    def retract(self) -> None:
        """Remove the answers to the last question, which is then answered again."""
        for talk in self.talks:
            if talk.dialogue and talk.dialogue[-1].role == "gpt":
                talk.dialogue.pop()

    def prompts(self, answerers: Sequence[Answerer]) -> list[str]:
        """What is sent to each run to answer the last question."""
        return [as_sent(answerer, talk) for answerer, talk in zip(answerers, self.talks, strict=True)]

    def answer(self, answerers: Sequence[Answerer]) -> Iterator[list[str]]:
        """Yield what each run has answered so far to the last question. What it said when this ends becomes a turn."""
        texts = [""] * len(self.talks)
        streams = [
            streamed_answer(answerer, answerer.tokens(talk.dialogue, talk.pictures), talk.pictures, self.stop)
            for answerer, talk in zip(answerers, self.talks, strict=True)
        ]
        try:
            for grown in zip_longest(*streams):
                texts = [new if new is not None else old for new, old in zip(grown, texts, strict=True)]
                yield texts
        finally:
            for stream, talk, text in zip(streams, self.talks, texts, strict=True):
                stream.close()
                talk.dialogue.append(Turn("gpt", text))

    def messages(self, run: int, growing: str = "") -> list[dict[str, Any]]:
        """The chat with one run as messages of Gradio's chatbot, whose texts are HTML.

        Args:
            run: which one.
            growing: the answer to a question that is still open.
        """
        said = [*(turn.text for turn in self.talks[run].dialogue[1::2]), growing]
        messages: list[dict[str, Any]] = []
        for (question, files), answer in zip(self.asked, said, strict=False):
            content = [*({"path": str(file)} for file in files), *([escape(question)] if question else [])]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": escape(answer)})
        return messages

    def clear(self) -> None:
        """Forget the chat and its pictures."""
        self.talks = [Talk() for _ in self.talks]
        self.asked = []
        self.forget()


def picture_in(name: str, data: bytes) -> Image:
    """An uploaded picture as the page shows it; raises SampleError if it is none, or too large."""
    try:
        with decoding(data):
            picture = load_rgb(data)
    except SampleError as error:
        raise SampleError(error.reason, f"{name} cannot be read as an image: {error}") from None
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return picture


def as_sent(answerer: Answerer, talk: Talk) -> str:
    """The tokens of a prompt as text, special ones included, with a mark for each picture's."""
    prompt = answerer.tokens(talk.dialogue, talk.pictures)
    text, at = "", 0
    for start, picture in zip(prompt.image_starts, talk.pictures, strict=False):
        text += f"{answerer.tokenizer.decode(prompt.input_ids[at:start])}[{len(picture.places)} tokens of a picture]"
        at = start + len(picture.places)
    return text + str(answerer.tokenizer.decode(prompt.input_ids[at:]))
