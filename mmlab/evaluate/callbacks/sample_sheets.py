"""What a model makes of a few fixed validation samples while it is trained: a sheet per look, and a table in wandb."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from mmlab.config.errors import DataError
from mmlab.data.conversation import IMAGE, Turn, conversations_of
from mmlab.data.dialogues import caption_of
from mmlab.data.formats import MAP, parse_record
from mmlab.data.image_collate import LATENTS, map_of, stored_tensors
from mmlab.data.index import ShardIndex
from mmlab.data.module import ShardDataModule
from mmlab.data.sample import ImageSpec, SampleError
from mmlab.evaluate.answers import Answerer
from mmlab.evaluate.pictures.generators import conditions, stage_generator
from mmlab.evaluate.pictures.reconstructions import reconstruct
from mmlab.evaluate.questions import read_picture
from mmlab.evaluate.scores.scorers import matches
from mmlab.model.autoencoder import AutoencoderModel
from mmlab.model.fidelity import psnr
from mmlab.model.first_stage import to_signed
from mmlab.model.vlm import VisionLanguageModel
from mmlab.report.sheet import BAD, GOOD, as_picture, contact_sheet
from mmlab.training.wandb_log import WandbLog

NAME = "val/samples"
SHORT = 2  # words of an answer that is right or wrong; a longer one is rather good or bad


@dataclass(frozen=True)
class Card:
    """One sample on a sheet.

    Attributes:
        picture: uint8 `[3, H, W]`, or None.
        cells: the other columns of its row in the table, by name.
        text: what stands under the picture.
        colour: of the card's edge, or None.
    """

    picture: torch.Tensor | None
    cells: dict[str, str]
    text: str
    colour: str | None = None


class Samples(L.Callback, ABC):
    """Shows what a model makes of fixed samples, as `<run>/samples/step-<N>.png` and in wandb.

    It looks after a validation, at most `sheets` times in a run and at its end, and changes nothing: modes and
    random state are as before. All ranks do the same, the first writes, so no rank waits for another in vain.

    Args:
        count: samples on a sheet.
        sheets: looks that are spread over a run.
    """

    def __init__(self, count: int = 8, sheets: int = 20):
        self.count = count
        self.sheets = sheets
        self._shown = 0

    @abstractmethod
    def show(self, trainer: L.Trainer, module: L.LightningModule) -> list[Card]:
        """The samples as the model sees them now; none where it has nothing to show."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shown = 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, last = trainer.global_step, trainer.global_step >= trainer.max_steps
        if trainer.sanity_checking or (step - self._shown < trainer.max_steps / self.sheets and not last):
            return
        self._shown = step
        modes = [(module, module.training) for module in pl_module.modules()]
        devices = [trainer.strategy.root_device] if trainer.strategy.root_device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), trainer.precision_plugin.forward_context():
            pl_module.eval()
            cards = self.show(trainer, pl_module)
        for module, training in modes:
            module.training = training
        if cards and trainer.is_global_zero:
            self._write(trainer, cards, step)

    def _write(self, trainer: L.Trainer, cards: list[Card], step: int) -> None:
        sheet = contact_sheet(
            [card.picture for card in cards],
            [card.text for card in cards],
            colours=[card.colour for card in cards],
            title=f"step {step:,}",
        )
        path = Path(trainer.default_root_dir, "samples", f"step-{step}.png")
        path.parent.mkdir(exist_ok=True)
        sheet.save(path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLog):
                columns = ["picture", *cards[0].cells]
                pictures = [None if card.picture is None else as_picture(card.picture) for card in cards]
                rows = [[picture, *card.cells.values()] for picture, card in zip(pictures, cards, strict=True)]
                logger.log_table(NAME, columns, rows, step)
                logger.log_pictures(f"{NAME}_sheet", [sheet], step)


class AnsweredSamples(Samples):
    """Validation samples with the model's likeliest answer beside the right one; for vision-language models.

    Args:
        count: see `Samples`.
        sheets: see `Samples`.
        max_new_tokens: longest answer.
    """

    def __init__(self, count: int = 8, sheets: int = 20, max_new_tokens: int = 32):
        super().__init__(count, sheets)
        self.max_new_tokens = max_new_tokens
        self._fixed: list[tuple[str, torch.Tensor | None, list[Turn]]] | None = None

    def show(self, trainer: L.Trainer, module: Any) -> list[Card]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(module.model, VisionLanguageModel) or not isinstance(data, ShardDataModule):
            return []
        spec = data.collate.image
        if spec is None or module.prompt.pictures != "tokens":
            return []
        if self._fixed is None:
            self._fixed = list(self._choose(data, module, spec))
        if not self._fixed:
            return []
        answerer = Answerer(module.model, module.prompt, spec.aspect, self.max_new_tokens)
        _, pictures, dialogues = zip(*self._fixed, strict=True)
        answers = answerer([dialogue[:1] for dialogue in dialogues], pictures)
        return [_answer_card(*fixed, answer) for fixed, answer in zip(self._fixed, answers, strict=True)]

    def _choose(
        self, data: ShardDataModule, module: Any, spec: ImageSpec
    ) -> Iterator[tuple[str, torch.Tensor | None, list[Turn]]]:
        """Samples spread evenly over the validation sources: key, picture, question and answer."""
        for n, (index, i) in enumerate(spread(data, self.count)):
            try:
                picture = read_picture(index, i, spec)
                record = parse_record(index.read(i, ("json", "txt")))
                dialogues = conversations_of(record, module.prompt, 0, picture is not None)
            except (SampleError, DataError, ValueError):
                continue  # validation counts and reports it
            # Another of a picture's questions each time: the first are often all alike.
            yield str(index.keys[i]), picture, dialogues[n % len(dialogues)][:2]


def spread(data: ShardDataModule, count: int) -> list[tuple[ShardIndex, int]]:
    """`count` validation samples, or as many as there are, spread evenly over the sources: index and number."""
    places = [(source.index, i) for source in data.val_sources for i in range(len(source.index))]
    chosen = np.linspace(0, len(places) - 1, count).round().astype(int) if places else []
    return [places[place] for place in np.unique(chosen)]


def _answer_card(key: str, picture: torch.Tensor | None, dialogue: list[Turn], prediction: str) -> Card:
    question, answer = dialogue[0].text.removeprefix(IMAGE).strip(), dialogue[1].text
    right = matches(prediction, answer)
    colour = GOOD if right else BAD if len(answer.split()) <= SHORT else None
    said = prediction or "(nothing)"
    lines = [question, said] if right else [question, said, f"(right: {answer})"]
    cells = {"key": key, "question": question, "answer": answer, "prediction": prediction}
    return Card(picture, cells, "\n".join(line for line in lines if line), colour)


class GeneratedSamples(Samples):
    """Pictures of classes that are spread over all, or of captions or maps that are spread over the validation samples.

    A look costs `count` pictures, of diffusion with at most `steps` steps, whatever the run's sampler is, and there are
    at most `sheets` of them.

    Args:
        count: pictures on a sheet.
        sheets: looks that are spread over a run.
        steps: most sampler steps.
    """

    def __init__(self, count: int = 16, sheets: int = 20, steps: int = 50):
        super().__init__(count, sheets)
        self.steps = steps
        self._told: tuple[dict[str, Tensor], list[str]] | None = None

    def show(self, trainer: L.Trainer, module: Any) -> list[Card]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ShardDataModule) or (generator := stage_generator(module, data, self.steps)) is None:
            return []
        if self._told is None:
            self._told = self._choose(module.model, data)
        given, words = self._told
        if not words:
            return []
        pictures = generator(given, list(range(len(words))))
        return [_generated_card(*pair) for pair in zip(pictures, words, strict=True)]

    def _choose(self, model: Any, data: ShardDataModule) -> tuple[dict[str, Tensor], list[str]]:
        """What the conditioner is given for each picture, and in words."""
        if model.conditioner.reads == "map":
            return _maps(data, self.count)
        if model.conditioner.reads != "text":
            return conditions(model.conditioner, [], self.count)
        captions = _captions(data, self.count)
        return conditions(model.conditioner, captions, len(captions)) if captions else ({}, [])


def _captions(data: ShardDataModule, count: int) -> list[str]:
    captions: list[str] = []
    for index, i in spread(data, count):
        try:
            caption = caption_of(parse_record(index.read(i, ("json", "txt"))), 0)
        except (SampleError, DataError, ValueError):
            continue  # validation counts and reports it
        captions += [caption] if caption else []
    return captions


def _maps(data: ShardDataModule, count: int) -> tuple[dict[str, Tensor], list[str]]:
    """Maps, or the codes of them, and the keys of their samples."""
    rows: list[Tensor] = []
    keys: list[str] = []
    spec = data.collate.image
    for index, i in spread(data, count):
        try:
            members = index.read(i, (MAP, LATENTS))
            stored = {} if spec is not None else stored_tensors(members[LATENTS])
            rows.append(map_of(members, spec) if spec is not None else stored["map_codes"].long())
        except (SampleError, DataError, KeyError):
            continue  # validation counts and reports it
        keys.append(str(index.keys[i]))
    name = "map_codes" if spec is None else "map_pixels"
    return ({name: torch.stack(rows)} if rows else {}), keys


def _generated_card(picture: Tensor, words: str) -> Card:
    return Card(picture, {"condition": words}, words)


class ReconstructedSamples(Samples):
    """Validation pictures, each with its reconstruction on the right and their PSNR below.

    Args:
        count: see `Samples`.
        sheets: see `Samples`.
    """

    def __init__(self, count: int = 8, sheets: int = 20):
        super().__init__(count, sheets)
        self._fixed: list[tuple[str, Tensor]] | None = None

    def show(self, trainer: L.Trainer, module: Any) -> list[Card]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(module.model, AutoencoderModel) or not isinstance(data, ShardDataModule):
            return []
        if self._fixed is None:
            self._fixed = self._choose(data)
        if not self._fixed:
            return []
        keys, pictures = zip(*self._fixed, strict=True)
        originals = torch.stack(pictures)
        back = reconstruct(module.model.first_stage, originals)
        decibels = psnr(to_signed(originals), to_signed(back)).tolist()
        pairs = torch.cat([originals, back], -1)
        return [_reconstruction_card(*card) for card in zip(pairs, keys, decibels, strict=True)]

    def _choose(self, data: ShardDataModule) -> list[tuple[str, Tensor]]:
        """Keys and pictures, as training decodes them."""
        chosen: list[tuple[str, Tensor]] = []
        spec = data.collate.image
        for index, i in spread(data, self.count) if spec is not None else []:
            try:
                picture = read_picture(index, i, spec)  # type: ignore[arg-type]
            except DataError:
                continue  # validation counts and reports it
            if picture is not None:
                chosen.append((str(index.keys[i]), picture))
        return chosen


def _reconstruction_card(pair: Tensor, key: str, decibels: float) -> Card:
    return Card(pair, {"key": key, "psnr": f"{decibels:.2f}"}, f"{decibels:.1f} dB")
