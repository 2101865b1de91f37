"""Answers of a trained model. Legend: B rows, T tokens, N images."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmlab.data.config import Prompt
from mmlab.data.conversation import chat_prompt, pad_id
from mmlab.data.dialogues import conversations_of
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec
from mmlab.data.templates import template_named
from mmlab.data.turns import Turn
from mmlab.evaluate.config import AnswerQualityConfig
from mmlab.evaluate.questions import Question, read_picture
from mmlab.model.vlm import VisionLanguageModel
from mmlab.runs.disk import to_json


class Answerer:
    """Asks a model questions in the prompt that it was trained with.

    Args:
        model: in eval mode, on its device.
        prompt: the prompt's settings.
        aspect: how images become square, as in training.
        max_new_tokens: longest answer.
        temperature: 0 is greedy decoding; otherwise tokens are sampled.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        prompt: Prompt,
        aspect: str,
        max_new_tokens: int = AnswerQualityConfig.max_new_tokens,
        temperature: float = 0.0,
    ):
        self.model = model
        self.prompt = prompt
        self.tokenizer = model.language.tokenizer
        self.spec = ImageSpec(model.vision.image_size, aspect, model.tokens_per_image)
        self.stop = template_named(prompt.template).stop(self.tokenizer)
        self.options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.options["temperature"] = temperature
        if self.stop != self.tokenizer.eos_token:
            self.options |= {"stop_strings": [self.stop], "tokenizer": self.tokenizer}

    def __call__(self, dialogues: Sequence[list[Turn]], pictures: Sequence[Tensor | None]) -> list[str]:
        """Answers to dialogues that end with a question; row b is about image b, uint8 `[3, H, W]` or None."""
        return [text for text, _ in self.replies(dialogues, pictures)]

    def replies(self, dialogues: Sequence[list[Turn]], pictures: Sequence[Tensor | None]) -> list[tuple[str, bool]]:
        """The answers, and whether each one was finished rather than cut off at `max_new_tokens`."""
        prompts = [chat_prompt(dialogue, self.prompt, self.tokenizer, self.spec) for dialogue in dialogues]
        # Padded on the left, because generation continues at the right edge of every row.
        rows = [torch.tensor(one.input_ids, dtype=torch.int64) for one in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id(self.tokenizer), padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        starts = [(row, place) for row, one in enumerate(prompts) for place in one.image_starts]
        positions = [(row, ids.shape[1] - len(rows[row]) + place) for row, place in starts]
        shown = [picture for row, _ in starts if (picture := pictures[row]) is not None]
        size, device = self.spec.size, next(self.model.parameters()).device
        pixels = torch.stack(shown) if shown else torch.zeros(0, 3, size, size, dtype=torch.uint8)
        places = torch.tensor(positions, dtype=torch.int64).reshape(-1, 2)
        new = self.model.generate(ids.to(device), mask.to(device), pixels.to(device), places.to(device), **self.options)
        return [(self._text(row), self._ended(row)) for row in new]

    def _text(self, ids: Tensor) -> str:
        text = str(self.tokenizer.decode(ids, skip_special_tokens=self.stop == self.tokenizer.eos_token))
        text = text.split(self.stop)[0]
        for token in (self.tokenizer.pad_token, self.tokenizer.eos_token):
            text = text.replace(str(token), "") if token else text
        return text.strip()

    def _ended(self, ids: Tensor) -> bool:
        # A row that was cut off has neither, and no padding.
        return self.tokenizer.eos_token_id in ids.tolist() or self.stop in str(self.tokenizer.decode(ids))

    def ask(self, question: str, picture: Tensor | None) -> list[Turn]:
        """A dialogue of one question, with the image in front of it."""
        record = {"questions": [{"question": question, "answer": "?"}]}
        return conversations_of(record, self.prompt, 0, picture is not None)[0][:1]


def answer_questions(
    answerer: Answerer, index: ShardIndex, questions: Sequence[Question], batch_size: int
) -> Iterator[tuple[int, str]]:
    """Yield (place in `questions`, answer); questions of similar length are answered together."""
    order = sorted(range(len(questions)), key=lambda n: (len(questions[n].text), questions[n].sample))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        pictures = [read_picture(index, questions[n].sample, answerer.spec) for n in batch]
        dialogues = [answerer.ask(questions[n].text, p) for n, p in zip(batch, pictures, strict=True)]
        yield from zip(batch, answerer(dialogues, pictures), strict=True)


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
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self._head + "\n", encoding="utf-8")
        self.answers |= answers
        with self.path.open("a", encoding="utf-8") as file:
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
            self.path.write_text(whole, encoding="utf-8")
        return dict(map(json.loads, lines[1:]))
