"""Whether a vision-language model uses its pictures: measured at the end of a run, printed, and logged."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import lightning as L
from tqdm import tqdm

from mmlab.data.dialogues import conversations_of
from mmlab.data.formats import parse_record
from mmlab.data.index import ShardIndex
from mmlab.data.module import ShardDataModule
from mmlab.data.turns import Dialogue
from mmlab.evaluate.answers import Answerer, Pictures
from mmlab.evaluate.baselines import BlindAnswerer
from mmlab.evaluate.callbacks.sample_sheets import evaluating, spread
from mmlab.evaluate.config import PictureUseConfig
from mmlab.evaluate.questions import read_pictures
from mmlab.evaluate.scores.constant_reply import variety
from mmlab.evaluate.scores.scorers import matches
from mmlab.model.vlm import VisionLanguageModel

WORDS = 3  # of a right answer that can be compared word for word; longer texts can be right in many ways
FEWEST = 8  # short answers from which a share of right ones is stated
SAME = 0.8  # share of longer replies that stay the same with another picture, above which pictures are not used
CHANCE = 0.05  # probability of so many more right answers without any use of the picture, below which it is used


@dataclass(frozen=True)
class Asked:
    """A question of the validation data: its dialogue up to it, its pictures and the right answer."""

    dialogue: Dialogue
    pictures: Pictures
    answer: str


@dataclass(frozen=True)
class Replies:
    """The right answers, and the replies with their own pictures, with blank ones and with another sample's."""

    right: list[str]
    own: list[str]
    blank: list[str]
    other: list[str]

    @property
    def scores(self) -> dict[str, float]:
        """Of short answers the shares of right ones; of longer ones the share that another picture does not change."""
        n = len(self.right)
        if self.short:
            rows = {"accuracy": self.own, "blind": self.blank, "other": self.other}
            return {name: sum(map(matches, texts, self.right)) / n for name, texts in rows.items()}
        same = sum(map(matches, self.own, self.other)) / n
        return {"unchanged": same, "distinct": variety(self.own)["distinct"] / n}

    @property
    def short(self) -> bool:
        """Whether the right answers are short enough to be compared."""
        return all(len(answer.split()) <= WORDS for answer in self.right)

    @property
    def used(self) -> bool:
        """Whether the pictures make a difference that chance does not explain."""
        if not self.short:
            return self.scores["unchanged"] <= SAME
        right = [matches(*pair) for pair in zip(self.own, self.right, strict=True)]

        def better(texts: list[str]) -> bool:
            # A one-sided sign test on the questions of which exactly one of the two answers is right.
            without = [matches(*pair) for pair in zip(texts, self.right, strict=True)]
            wins = sum(a and not b for a, b in zip(right, without, strict=True))
            losses = sum(b and not a for a, b in zip(right, without, strict=True))
            count = wins + losses
            return sum(comb(count, n) for n in range(wins, count + 1)) / 2**count < CHANCE

        return better(self.blank) and better(self.other)

    @property
    def sentence(self) -> str:
        """What a run prints."""
        n, scores = len(self.right), self.scores
        if self.short:
            start = f"The picture is {'used' if self.used else 'not used'}"
            own, blank, other = (f"{scores[name]:.1%}" for name in ("accuracy", "blind", "other"))
            return (
                f"{start}: {own} of {n} validation questions are answered right with it, {blank} with a blank picture, "
                f"and {other} with that of another sample."
            )
        # Not that it is used: a reply that changes need not be right.
        start = f"Replies {'depend' if self.used else 'hardly depend'} on the picture"
        same, texts = sum(map(matches, self.own, self.other)), variety(self.own)["distinct"]
        return (
            f"{start}: {same} of {n} replies to validation samples stay the same with the picture of another sample; "
            f"there are {texts} distinct replies, and {variety(self.right)['distinct']} distinct right ones."
        )


class PictureUse(L.Callback):
    """Asks a few fixed validation questions at the end of a run: with their pictures, blank ones, and those of others.

    A language model can lower its loss without looking at the picture, and then gives the commonest answers. Short
    answers are compared with the right ones; of captions and other long texts, it counts the replies that another
    picture changes, right or wrong. The sentence is printed, and the numbers are logged as `val/picture/…`. Runs of
    other models and without validation data are left alone. All ranks compute the same, so that none waits for another;
    modes and random state are restored.

    Args:
        config: settings.
    """

    def __init__(self, config: PictureUseConfig):
        self.config = config

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.global_step < trainer.max_steps:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module.model, VisionLanguageModel) or not isinstance(data, ShardDataModule):
            return
        answerer = Answerer(pl_module.model, pl_module.config.prompt, data.config, self.config.max_new_tokens)
        questions = self.questions(data, answerer)
        if all(one.pictures is questions[0].pictures for one in questions):
            return
        with evaluating(trainer, pl_module):
            replies = ask(answerer, questions, data.config.micro_batch)
        numbers = {f"val/picture/{name}": value for name, value in replies.scores.items()}
        pl_module.log_dict(numbers, rank_zero_only=False)
        if trainer.is_global_zero:
            tqdm.write(replies.sentence)  # Lightning's own messages are silenced in a run

    def questions(self, data: ShardDataModule, answerer: Answerer) -> list[Asked]:
        """Questions about samples that are spread over the validation data, as training would ask them.

        If enough of them have short answers, only these; samples have the same number of pictures. Questions before the
        first picture are left out, and those that leave no room for the answer in a row of training.
        """
        config: Any = data.config
        room = config.max_length - self.config.max_new_tokens
        if answerer.prompt.pictures != "tokens":
            return []

        def read(n: int, index: ShardIndex, i: int) -> list[Asked]:
            pictures = answerer.decode(read_pictures(index, i))
            record = parse_record(index.read(i, ("json", "txt")))
            dialogues = conversations_of(record, answerer.prompt, n, len(pictures)) if pictures else []
            asked = [Asked(dialogue[:1], pictures, dialogue[1].text) for dialogue in dialogues if dialogue[0].images]
            return [one for one in asked if len(answerer.tokens(one.dialogue, pictures)) <= room]

        asked = [one for sample in spread(data, self.config.questions, read) for one in sample]
        short = [one for one in asked if len(one.answer.split()) <= WORDS]
        asked = short if len(short) >= FEWEST else asked
        by_form: dict[Any, list[Asked]] = defaultdict(list)
        for one in asked:
            by_form[tuple(len(picture.places) for picture in one.pictures)].append(one)
        alike = max(by_form.values(), key=len, default=[])
        step = max(1, len(alike) // self.config.questions)
        return alike[::step][: self.config.questions]


def ask(answerer: Answerer, questions: Sequence[Asked], batch_size: int) -> Replies:
    """Ask questions with their own pictures, with blank ones, and each with the pictures of another sample.

    Args:
        answerer: asks the model.
        questions: about at least two samples.
        batch_size: questions at a time.
    """
    own, others, blind = [one.pictures for one in questions], other_pictures(questions), BlindAnswerer(answerer)

    def replies(asked: Answerer, shown: Sequence[Pictures]) -> list[str]:
        parts = [slice(start, start + batch_size) for start in range(0, len(questions), batch_size)]
        dialogues = [one.dialogue for one in questions]
        return [text for part in parts for text in asked(dialogues[part], shown[part])]

    right = [one.answer for one in questions]
    return Replies(right, replies(answerer, own), replies(blind, own), replies(answerer, others))


def other_pictures(questions: Sequence[Asked]) -> list[Pictures]:
    """For each question the pictures of another sample, half of the list away or as soon as possible after it."""
    count = len(questions)
    return [
        next(
            there
            for step in range(count)
            if (there := questions[(n + count // 2 + step) % count].pictures) is not one.pictures
        )
        for n, one in enumerate(questions)
    ]
