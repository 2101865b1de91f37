"""What a diffusion model draws while it is trained: the same noise under the same conditions at each look."""

from copy import copy
from typing import Any

import lightning as L
from torch import Tensor

from mmlab.config.errors import DataError
from mmlab.data.dialogues import caption_of
from mmlab.data.formats import parse_record
from mmlab.data.image_collate import LatentCollate
from mmlab.data.module import ShardDataModule
from mmlab.data.sample import SampleError
from mmlab.evaluate.generation import Generator, conditions
from mmlab.evaluate.samples import Card, Samples, spread
from mmlab.model.diffusion_model import DiffusionModel


class GeneratedSamples(Samples):
    """Pictures of classes that are spread over all, or of captions that are spread over the validation samples.

    A look costs `count` pictures of at most `steps` steps, whatever the run's sampler is, and there are at most
    `sheets` of them.

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
        if not isinstance(module.model, DiffusionModel) or not isinstance(data, ShardDataModule):
            return []
        if self._told is None:
            self._told = self._choose(module.model, data)
        given, words = self._told
        if not words:
            return []
        sampler = copy(module.sampler)
        sampler.steps = min(sampler.steps, self.steps)
        generator = Generator(module.model, module.process, sampler, picture_size(data.collate, module.model))
        pictures = generator(given, list(range(len(words))))
        return [_card(*pair) for pair in zip(pictures, words, strict=True)]

    def _choose(self, model: DiffusionModel, data: ShardDataModule) -> tuple[dict[str, Tensor], list[str]]:
        """What the conditioner is given for each picture, and in words."""
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


def picture_size(collate: Any, model: DiffusionModel) -> int:
    """Side of the pictures in pixels."""
    return collate.shape[1] * model.first_stage.factor if isinstance(collate, LatentCollate) else collate.image.size


def _card(picture: Tensor, words: str) -> Card:
    return Card(picture, {"condition": words}, words)
