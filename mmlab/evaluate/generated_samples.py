"""What a generative model draws while it is trained: from the same seeds under the same conditions at each look."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from mmlab.config.errors import DataError
from mmlab.data.dialogues import caption_of
from mmlab.data.formats import MAP, parse_record
from mmlab.data.image_collate import LATENTS, map_of, stored_tensors
from mmlab.data.module import ShardDataModule
from mmlab.data.sample import SampleError
from mmlab.evaluate.generation import conditions
from mmlab.evaluate.samples import Card, Samples, spread
from mmlab.evaluate.stage_generator import stage_generator


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
        return [_card(*pair) for pair in zip(pictures, words, strict=True)]

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


def _card(picture: Tensor, words: str) -> Card:
    return Card(picture, {"condition": words}, words)
