"""Answers of a trained model. Legend: B rows, T tokens."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmlab.data.anyres import image_spec
from mmlab.data.bad_samples import BadSamples
from mmlab.data.config import Prompt
from mmlab.data.conversation import Segment, chat_prompt, check_vocabulary, pad_id
from mmlab.data.dialogues import conversations_of
from mmlab.data.images import decode_picture
from mmlab.data.index import ShardIndex
from mmlab.data.packing import Shown, place_pictures
from mmlab.data.sample_types import Picture, SampleError
from mmlab.data.templates import template_named
from mmlab.data.turns import Dialogue, Turn
from mmlab.evaluate.config import AnswerQualityConfig
from mmlab.evaluate.questions import Question, read_pictures
from mmlab.model.language import LanguageOnly
from mmlab.model.vlm import VisionLanguageModel
from mmlab.runs.disk import to_json, write_text, writing

Pictures = Sequence[Picture]
"""What one dialogue shows."""


class Answerer:
    """Asks a model questions in the prompt that it was trained with.

    Args:
        model: in eval mode, on its device.
        prompt: the prompt's settings.
        data: settings of the data that it was trained on, which say how pictures are decoded.
        max_new_tokens: longest answer.
        temperature: 0 is greedy decoding; otherwise tokens are sampled.
    """

    def __init__(
        self,
        model: VisionLanguageModel | LanguageOnly,
        prompt: Prompt,
        data: Any,
        max_new_tokens: int = AnswerQualityConfig.max_new_tokens,
        temperature: float = 0.0,
    ):
        self.model = model
        self.prompt = prompt
        self.tokenizer = model.language.tokenizer
        self.spec = image_spec(model, data) if isinstance(model, VisionLanguageModel) else None
        self.stop = template_named(prompt.template).stop(self.tokenizer)
        self.options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.options["temperature"] = temperature
        if self.stop != self.tokenizer.eos_token:
            self.options |= {"stop_strings": [self.stop], "tokenizer": self.tokenizer}

    def __call__(self, dialogues: Sequence[Dialogue], pictures: Sequence[Pictures]) -> list[str]:
        """Answers to dialogues that end with a question; dialogue b shows the pictures b."""
        return [text for text, _ in self.replies(dialogues, pictures)]

    def replies(self, dialogues: Sequence[Dialogue], pictures: Sequence[Pictures]) -> list[tuple[str, bool]]:
        """The answers, and whether each one was finished rather than cut off at `max_new_tokens`."""
        pairs = zip(dialogues, pictures, strict=True)
        return self.complete([self.tokens(dialogue, shown) for dialogue, shown in pairs], pictures)

    def decode(self, files: Sequence[bytes]) -> Pictures:
        """Pictures as the model reads them; none for a language model. Raises SampleError as `decode_image`."""
        return [] if self.spec is None else [decode_picture(data, self.spec) for data in files]

    def tokens(self, dialogue: Dialogue, pictures: Pictures) -> Segment:
        """The prompt of a dialogue that ends with a question; raises SampleError if its texts make none."""
        prompt = chat_prompt(dialogue, self.prompt, self.tokenizer, [len(picture.places) for picture in pictures])
        check_vocabulary(prompt.input_ids, self.model.language.vocabulary, self.tokenizer)
        return prompt

    def complete(
        self, prompts: Sequence[Segment], pictures: Sequence[Pictures], **options: Any
    ) -> list[tuple[str, bool]]:
        """As `replies`, to prompts that are tokens; `options` are further ones of transformers' `generate`."""
        # Padded on the left, because generation continues at the right edge of every row.
        rows = [torch.tensor(one.input_ids, dtype=torch.int64) for one in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id(self.tokenizer), padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        shown = [
            Shown(picture, row, ids.shape[1] - len(rows[row]) + start)
            for row, (one, there) in enumerate(zip(prompts, pictures, strict=True))
            for start, picture in zip(one.image_starts, there, strict=False)  # later turns may show more of them
        ]
        tokens, size = (self.spec.tokens, self.spec.size) if self.spec else (0, 0)
        placed = place_pictures(shown, tokens, size)
        inputs = (ids, mask, placed["pixel_values"], placed["image_positions"], placed["image_features"])
        device = next(self.model.parameters()).device
        new = self.model.generate(*(tensor.to(device) for tensor in inputs), **self.options, **options)
        return [(self.text(row), self._ended(row)) for row in new]

    def text(self, ids: Tensor | list[int]) -> str:
        """The answer that the new tokens of one row say, up to the prompt's stop."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=self.stop == self.tokenizer.eos_token))
        text = text.split(self.stop)[0]
        for token in (self.tokenizer.pad_token, self.tokenizer.eos_token):
            text = text.replace(str(token), "") if token else text
        return text.strip()

    def _ended(self, ids: Tensor) -> bool:
        # A row that was cut off has neither, and no padding.
        return self.tokenizer.eos_token_id in ids.tolist() or self.stop in str(self.tokenizer.decode(ids))

    def ask(
        self,
        question: str,
        pictures: int,
        earlier: Sequence[tuple[str, str]] = (),
        system: str | None = None,
        caption: str | None = None,
        images: Sequence[int] = (),
    ) -> Dialogue:
        """A dialogue that ends with a question, with its pictures where `conversations_of` puts them.

        Args:
            question: the last question.
            pictures: how many the whole dialogue is about.
            earlier: the questions and answers before it.
            system: the dialogue's own system message; None: the prompt's.
            caption: stands for the picture, if the prompt says so (`pictures=text`).
            images: how many of them each question marks; empty: they open the dialogue, see `Question.images`.

        Raises:
            SampleError: a first question that is empty and not about a picture, and what `conversations_of` raises.
        """
        texts = (*(text for text, _ in earlier), question)
        if images and self.prompt.pictures == "tokens":
            asked = [[Turn("human", text, images=n), Turn("gpt", "?")] for text, n in zip(texts, images, strict=True)]
            asked[0][0] = replace(asked[0][0], system=system)
            dialogue = [turn for pair in asked for turn in pair][:-1]
        else:
            turns = [{"from": "system", "value": system}] * (system is not None)
            for text in texts:
                turns += [{"from": "human", "value": text}, {"from": "gpt", "value": "?"}]
            prompt = replace(self.prompt, turns="conversations")
            told = caption is not None and prompt.pictures == "text"
            record = {"conversations": turns, **({"caption": caption} if told else {})}
            # Without marks, the caption stands before the first question only if there is a picture.
            dialogue = conversations_of(record, prompt, 0, int(told and not images) or pictures)[0][:-1]
        dialogue[1::2] = [Turn("gpt", answer) for _, answer in earlier]  # a model's own answer may be empty
        return dialogue


def answer_questions(
    answerer: Answerer,
    index: ShardIndex,
    questions: Sequence[Question],
    batch_size: int,
    bad: BadSamples | None = None,
    done: Mapping[int, str] | None = None,
    own: bool = False,
) -> Iterator[tuple[int, str]]:
    """Yield (place in `questions`, answer); questions of similar length are answered together.

    Args:
        answerer: the model.
        index: the questions' shards.
        questions: any number of questions.
        batch_size: questions at a time.
        bad: where samples are counted whose image or text cannot be used; their questions are left out.
        done: answers of an earlier start, which are not computed again.
        own: put the model's own answers before the later questions of a dialogue, instead of the right ones.

    Raises:
        DataError: more bad samples than the budget allows.
    """
    bad = BadSamples(index.root, len(index)) if bad is None else bad
    answers = dict(done or {})
    places = {_thread(question): n for n, question in enumerate(questions)} if own else {}
    for order in _rounds(questions, own):
        left = [n for n in order if n not in answers]
        for start in range(0, len(left), batch_size):
            batch, prompts, pictures = [], [], []
            for n in left[start : start + batch_size]:
                question = questions[n]
                with bad.left_out(question.key):
                    shown = answerer.decode(read_pictures(index, question.sample))
                    earlier = _with_own(question, places, answers) if own else question.earlier
                    dialogue = answerer.ask(
                        question.text, len(shown), earlier, question.system, question.caption, question.images
                    )
                    prompts.append(answerer.tokens(dialogue, shown))
                    batch.append(n)
                    pictures.append(shown)
            if batch:
                texts = [text for text, _ in answerer.complete(prompts, pictures)]
                answers.update(zip(batch, texts, strict=True))
                yield from zip(batch, texts, strict=True)


def _rounds(questions: Sequence[Question], own: bool) -> list[list[int]]:
    """Places of questions in the order in which they are asked; with `own`, earlier turns in earlier rounds."""
    rounds: dict[int, list[int]] = {}
    for n, question in enumerate(questions):
        rounds.setdefault(len(question.earlier) if own else 0, []).append(n)

    def length(n: int) -> tuple[int, int]:
        question = questions[n]
        return len(question.text) + sum(len(text) for pair in question.earlier for text in pair), question.sample

    return [sorted(rounds[turn], key=length) for turn in sorted(rounds)]


_Thread = tuple[int, str | None, tuple[str, ...]]


def _thread(question: Question, turn: int | None = None) -> _Thread:
    """Sample, system message and questions of a dialogue up to a turn, by default its own."""
    texts = (*(text for text, _ in question.earlier), question.text)
    return question.sample, question.system, texts[: len(texts) if turn is None else turn + 1]


def _with_own(question: Question, places: Mapping[_Thread, int], answers: Mapping[int, str]) -> list[tuple[str, str]]:
    """The earlier questions of a dialogue with the model's answers.

    Args:
        question: one of the dialogue's questions.
        places: place of each question among those that are asked, by `_thread`.
        answers: place → answer.
    """
    earlier = []
    for turn, (text, _) in enumerate(question.earlier):
        answer = answers.get(places.get(_thread(question, turn), -1))
        if answer is None:
            raise SampleError("history", "An earlier question of its dialogue has no answer of the model.")
        earlier.append((text, answer))
    return earlier


class AnswerFile:
    """A file of the answers of an unfinished evaluation, from which a killed one resumes.

    Its first line says what they depend on; there is one line for each answer below it.

    Args:
        path: the file, which exists while the evaluation is unfinished.
        about: what the answers depend on, as JSON data. Answers that depend on anything else are discarded.

    Attributes:
        answers: place of a question → its answer, a text or other JSON data.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        self._head = to_json(about, sort_keys=True)
        self.answers = self._read()

    def add(self, answers: Mapping[int, Any]) -> None:
        """Save answers, and wait until they are on the disk."""
        if not self.answers:
            write_text(self.path, self._head + "\n")
        self.answers |= answers
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(to_json([n, answer]) + "\n" for n, answer in answers.items())
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the file, once the evaluation is finished."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[int, Any]:
        if not self.path.is_file():
            return {}
        data = self.path.read_text(encoding="utf-8", errors="replace")
        whole = data[: data.rfind("\n") + 1]  # a killed process may leave half a line
        lines = whole.split("\n")[:-1]
        if not lines or lines[0] != self._head:
            return {}
        if len(whole) < len(data):
            write_text(self.path, whole)
        return dict(map(json.loads, lines[1:]))
