"""Sheets of a few fixed validation samples as the model sees them during training, also logged as a table."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import lightning as L
import torch
from torch import Tensor

from mmlab.data.bad_samples import sample_errors
from mmlab.data.cache_collate import stored_tensors
from mmlab.data.dialogues import caption_of, conversations_of
from mmlab.data.formats import LATENTS, MAP, parse_record
from mmlab.data.image_collate import map_of
from mmlab.data.images import decode_picture
from mmlab.data.index import ShardIndex
from mmlab.data.mixture import Sequential
from mmlab.data.module import ShardDataModule
from mmlab.data.sample_types import Picture, SampleError
from mmlab.data.subsets import evenly_spaced
from mmlab.data.turns import Turn, text_without_images
from mmlab.evaluate.answers import Answerer
from mmlab.evaluate.config import (
    AnsweredSamplesConfig,
    GeneratedSamplesConfig,
    ReconstructedSamplesConfig,
    SamplesConfig,
)
from mmlab.evaluate.pictures.generators import GENERATIVE, conditions, stage_generator
from mmlab.evaluate.pictures.reconstructions import reconstruct
from mmlab.evaluate.questions import read_picture, read_pictures
from mmlab.evaluate.scores.scorers import matches
from mmlab.model.autoencoder import AutoencoderModel
from mmlab.model.fidelity import psnr
from mmlab.model.first_stage import to_signed
from mmlab.model.vlm import VisionLanguageModel
from mmlab.report.contact_sheet import BAD, GOOD, as_picture, contact_sheet
from mmlab.runs.disk import replacing, writing_later
from mmlab.training.ema import averaged

NAME = "val/samples"
SHORT = 2  # words of an answer that is simply right or wrong; longer ones are more or less good

T = TypeVar("T")


@dataclass(frozen=True)
class Card:
    """One sample on a sheet.

    Attributes:
        picture: uint8 `[3, H, W]`, or None.
        cells: the other columns of its row in the table, by name.
        text: the text below the image.
        color: of the card's edge, or None.
    """

    picture: Tensor | None
    cells: dict[str, str]
    text: str
    color: str | None = None


class Samples(L.Callback, ABC):
    """Shows fixed samples after validations, as `<run>/samples/step-<N>.png` and in loggers that take images or tables.

    It uses the average weights under `EMA`, and changes nothing: modes and random state are restored. All ranks compute
    the same and the first one writes, so that none waits for another.

    Args:
        config: settings.
    """

    def __init__(self, config: SamplesConfig):
        self.config = config
        self._shown = 0

    @abstractmethod
    def show(self, trainer: L.Trainer, module: Any) -> list[Card]:
        """The samples as the model sees them now; empty if it has nothing to show."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shown = 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        step, last = trainer.global_step, trainer.global_step >= trainer.max_steps
        if trainer.sanity_checking or (step - self._shown < trainer.max_steps / self.config.sheets and not last):
            return
        self._shown = step
        with evaluating(trainer, pl_module):
            cards = self.show(trainer, pl_module)
        if cards and trainer.is_global_zero:
            self._write(trainer, cards, step)

    def _write(self, trainer: L.Trainer, cards: list[Card], step: int) -> None:
        sheet = contact_sheet(
            [card.picture for card in cards],
            [card.text for card in cards],
            colors=[card.color for card in cards],
            title=f"step {step:,}",
        )
        path = Path(trainer.default_root_dir, "samples", f"step-{step}.png")
        with writing_later(path), replacing(path) as draft:
            sheet.save(draft)
        pictures = [None if card.picture is None else as_picture(card.picture) for card in cards]
        rows = [[picture, *card.cells.values()] for picture, card in zip(pictures, cards, strict=True)]
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table(NAME, ["picture", *cards[0].cells], rows, step)  # type: ignore[attr-defined]
            if hasattr(logger, "log_pictures"):
                logger.log_pictures(f"{NAME}_sheet", [sheet], step)  # type: ignore[attr-defined]


@contextmanager
def evaluating(trainer: L.Trainer, module: Any) -> Iterator[None]:
    """Evaluate the stage's averaged weights in the block, and restore modes and random state."""
    modes = [(part, part.training) for part in module.modules()]
    devices = [trainer.strategy.root_device] if trainer.strategy.root_device.type == "cuda" else []
    with (
        averaged(module.model),
        torch.random.fork_rng(devices),
        torch.no_grad(),
        trainer.precision_plugin.forward_context(),
    ):
        module.eval()
        yield
    for part, training in modes:
        part.training = training


class ValidationSamples(Samples):
    """Samples that are chosen once, at the first sheet; nothing is shown for other models and data."""

    models: ClassVar[tuple[type, ...]]
    _chosen: Any = None

    @abstractmethod
    def choose(self, data: ShardDataModule, module: Any) -> Any:
        """What is shown each time; empty for nothing."""

    @abstractmethod
    def make_cards(self, data: ShardDataModule, module: Any, chosen: Any) -> list[Card]:
        """A card for each sample that was chosen."""

    def show(self, trainer: L.Trainer, module: Any) -> list[Card]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(module.model, self.models) or not isinstance(data, ShardDataModule):
            return []
        if self._chosen is None:
            self._chosen = self.choose(data, module)
        return self.make_cards(data, module, self._chosen) if self._chosen else []


def spread(data: ShardDataModule, count: int, read: Callable[[int, ShardIndex, int], T | None]) -> list[T]:
    """Validation samples, spread evenly over the sources; those that are unreadable or read as None are left out.

    Args:
        data: of the run.
        count: number of samples, or as many as there are.
        read: (number of the sample on the sheet, index, place in the index) → what to return of it.
    """
    indexes = list({id(source.index): source.index for source in data.val_sources}.values())  # buckets share theirs
    sizes = [len(index) for index in indexes]
    order = Sequential(sizes)
    values: list[T | None] = []
    for n, position in enumerate(evenly_spaced(sum(sizes), count)):
        source, cursor = order.at(position)
        with suppress(SampleError), sample_errors():  # validation counts and reports them
            values.append(read(n, indexes[source], cursor % sizes[source]))
    return [value for value in values if value is not None]


class AnsweredSamples(ValidationSamples):
    """Validation samples with the model's greedy answer beside the right one; for vision-language models.

    Args:
        config: settings.
    """

    config: AnsweredSamplesConfig
    models = (VisionLanguageModel,)

    def choose(self, data: ShardDataModule, module: Any) -> list[tuple[str, list[Picture], list[Turn]]]:
        """Keys, pictures, and dialogues of one question and its answer."""
        spec: Any = data.collate.image
        if spec is None or module.config.prompt.pictures != "tokens":
            return []

        def read(n: int, index: ShardIndex, i: int) -> tuple[str, list[Picture], list[Turn]]:
            pictures = [decode_picture(data, spec) for data in read_pictures(index, i)]
            record = parse_record(index.read(i, ("json", "txt")))
            dialogues = conversations_of(record, module.config.prompt, 0, len(pictures))
            # Another of an image's questions each time: the first ones are often all alike.
            return str(index.keys[i]), pictures, dialogues[n % len(dialogues)][:2]

        return spread(data, self.config.count, read)

    def make_cards(self, data: ShardDataModule, module: Any, chosen: Any) -> list[Card]:
        answerer = Answerer(module.model, module.config.prompt, data.config, self.config.max_new_tokens)
        answers = answerer([dialogue[:1] for *_, dialogue in chosen], [pictures for _, pictures, _ in chosen])
        return [
            answer_card(key, _side_by_side(pictures), dialogue, answer)
            for (key, pictures, dialogue), answer in zip(chosen, answers, strict=True)
        ]


def _side_by_side(pictures: list[Picture]) -> Tensor | None:
    """Pictures in one row, each as one square."""
    return torch.cat([picture.tiles[0] for picture in pictures], -1) if pictures else None


def answer_card(key: str, picture: Tensor | None, dialogue: list[Turn], prediction: str) -> Card:
    """The card of a question; its edge is green or red if the answer is right or wrong."""
    question, answer = text_without_images(dialogue[0]).strip(), dialogue[1].text
    right = matches(prediction, answer)
    color = GOOD if right else BAD if len(answer.split()) <= SHORT else None
    lines = [question, prediction or "(nothing)", "" if right else f"(right: {answer})"]
    cells = {"key": key, "question": question, "answer": answer, "prediction": prediction}
    return Card(picture, cells, "\n".join(line for line in lines if line), color)


class GeneratedSamples(ValidationSamples):
    """Images of classes spread over all, or of captions or maps spread over the validation samples.

    Args:
        config: settings.
    """

    config: GeneratedSamplesConfig
    models = GENERATIVE

    def choose(self, data: ShardDataModule, module: Any) -> tuple[dict[str, Tensor], list[str]] | tuple[()]:
        """Inputs of the conditioner, and labels."""
        conditioner, count = module.model.conditioner, self.config.count
        if conditioner.reads == "map":
            rows = spread(data, count, lambda n, index, i: (_map(data, index, i), str(index.keys[i])))
            name = "map_codes" if data.collate.image is None else "map_pixels"
            return ({name: torch.stack([row for row, _ in rows])}, [key for _, key in rows]) if rows else ()
        if conditioner.reads != "text":
            return conditions(conditioner, [], count)
        captions = spread(
            data, count, lambda n, index, i: caption_of(parse_record(index.read(i, ("json", "txt"))), 0) or None
        )
        return conditions(conditioner, captions, len(captions)) if captions else ()

    def make_cards(self, data: ShardDataModule, module: Any, chosen: Any) -> list[Card]:
        inputs, labels = chosen
        pictures = stage_generator(module, data, self.config.steps)(inputs, list(range(len(labels))))
        pairs = zip(pictures, labels, strict=True)
        return [Card(picture, {"condition": label}, label) for picture, label in pairs]


def _map(data: ShardDataModule, index: ShardIndex, i: int) -> Tensor:
    """A sample's map, or the codes of it."""
    members = index.read(i, (MAP, LATENTS))
    spec = data.collate.image
    return map_of(members, spec) if spec is not None else stored_tensors(members[LATENTS])["map_codes"].long()


class ReconstructedSamples(ValidationSamples):
    """Validation images, each with its reconstruction on the right and their PSNR below.

    Args:
        config: settings.
    """

    config: ReconstructedSamplesConfig
    models = (AutoencoderModel,)

    def choose(self, data: ShardDataModule, module: Any) -> list[tuple[str, Tensor]]:
        """Keys and images, as training decodes them."""
        spec = data.collate.image
        if spec is None:
            return []

        def read(n: int, index: ShardIndex, i: int) -> tuple[str, Tensor] | None:
            picture = read_picture(index, i, spec)
            return None if picture is None else (str(index.keys[i]), picture)

        return spread(data, self.config.count, read)

    def make_cards(self, data: ShardDataModule, module: Any, chosen: Any) -> list[Card]:
        keys, pictures = zip(*chosen, strict=True)
        cards = []
        for key, picture in zip(keys, pictures, strict=True):  # one by one: buckets have different shapes
            back = reconstruct(module.model.first_stage, picture[None])
            decibels = f"{psnr(to_signed(picture[None]), to_signed(back)).item():.2f}"
            pair = torch.cat([picture, back[0]], -1)
            cards.append(Card(pair, {"key": key, "psnr": decibels}, f"{float(decibels):.1f} dB"))
        return cards
