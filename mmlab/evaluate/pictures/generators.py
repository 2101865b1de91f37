"""Pictures from generative models: diffusion models and code priors.

Legend: B pictures, C/h/w latents or rows and columns of codes, S side in pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.cache_collate import CodeCollate
from mmlab.data.formats import MAP
from mmlab.data.image_collate import LatentCollate, map_of
from mmlab.data.image_condition import Conditioning
from mmlab.data.images import decode_image
from mmlab.data.module import ShardDataModule
from mmlab.data.sample import ImageSpec, SampleError
from mmlab.diffusion.process import NoiseProcess
from mmlab.diffusion.samplers import Sampler
from mmlab.diffusion.walk import Step
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.keyed import normal, uniform
from mmlab.model.code_prior_model import CodePriorModel
from mmlab.model.code_sampling import CodeSampler, sample_codes
from mmlab.model.denoiser import DiffusionModel
from mmlab.model.first_stage import to_uint8


@dataclass(frozen=True)
class Generator:
    """A diffusion model with all that it takes to draw pictures from it.

    Attributes:
        model: in eval mode, on its device.
        process: that it was trained with.
        sampler: how it is walked back.
        size: side of the pictures in pixels.
    """

    model: DiffusionModel
    process: NoiseProcess
    sampler: Sampler
    size: int

    begins: ClassVar[str] = "x_T: noise"
    on_the_way: ClassVar[str] = "x_t on its way from noise, decoded"

    @property
    def steps(self) -> int:
        """How often `on_step` is called for a batch."""
        return self.sampler.steps

    @torch.no_grad()
    def __call__(
        self, given: dict[str, Tensor], seeds: list[int], on_step: Callable[[Any], None] | None = None
    ) -> Tensor:
        """uint8 `[B, 3, S, S]`: picture b depends on the model, on row b of `given` and on seed b alone."""
        x = self.noise(seeds)
        condition = self.model.conditioner({name: value.to(x.device) for name, value in given.items()})
        null = self.model.conditioner.null(len(seeds), x.device)
        z = self.sampler(self.model, self.process, x, condition=condition, null=null, rng=seeds, on_step=on_step)
        return self.decode(z)

    def noise(self, seeds: list[int]) -> Tensor:
        """The noise that sampling starts from, float32 `[B, C, h, w]`."""
        first_stage = self.model.first_stage
        side = first_stage.side(self.size)
        return normal(seeds, (first_stage.channels, side, side), "start").to(first_stage.latent_mean.device)

    @torch.no_grad()
    def decode(self, z_BChw: Tensor) -> Tensor:
        """Normalised latents on any device → uint8 pictures on the CPU."""
        first_stage = self.model.first_stage
        return to_uint8(first_stage.decode(first_stage.raw(z_BChw.to(first_stage.latent_mean.device)))).cpu()


def conditions(
    conditioner: Any, asked: Sequence[str | int], count: int, spec: ImageSpec | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """(what the conditioner is given, in words) for `count` pictures.

    Args:
        conditioner: of a generative model.
        asked: what the pictures are told in turn: classes, none of them for classes spread over all; texts; or files
            of maps.
        count: how many pictures.
        spec: how maps are decoded.

    Raises:
        ConfigError: a class that the model does not know, or a map that is no picture.
    """
    if conditioner.reads == "class":
        few = np.linspace(0, len(conditioner.names) - 1, min(count, len(conditioner.names))).round().astype(int)
        labels = [conditioner.index(name) for name in asked] or few.tolist()
        labels = [labels[n % len(labels)] for n in range(count)]
        return {"labels": torch.tensor(labels)}, [conditioner.names[label] for label in labels]
    if conditioner.reads == "text":
        texts = [str(asked[n % len(asked)]) for n in range(count)]
        return conditioner.tokenize(texts), texts
    if conditioner.reads == "map":
        assert spec is not None
        maps = [read_map(str(name), spec) for name in asked]
        words = [Path(str(name)).name for name in asked]
        turns = [n % len(asked) for n in range(count)]
        return {"map_pixels": torch.stack([maps[n] for n in turns])}, [words[n] for n in turns]
    return {}, [""] * count


def read_map(path: str, spec: ImageSpec) -> Tensor:
    """A map from a picture file, uint8 `[3, S, S]`; raises ConfigError where it is none."""
    try:
        return decode_image(Path(path).expanduser().read_bytes(), spec)
    except (OSError, SampleError) as error:
        raise ConfigError(f"map={path} cannot be read: {error}.") from error


class BorrowedConditions:
    """Conditions of `count` samples, taken from a set of pictures: spread evenly over it, or all of it in turn.

    Args:
        model: whose conditioner reads them.
        pictures: with records; those without a class, caption or map that the model knows are passed over.
        count: samples that will be drawn.

    Raises:
        DataError: no picture has one.
    """

    def __init__(self, model: Any, pictures: PictureSet, count: int):
        conditioner: Any = model.conditioner
        self.maps = pictures if conditioner.reads == "map" else None
        found: list[int] = []
        labels = conditioner.names if conditioner.reads == "class" else None
        text = conditioner.reads == "text"
        read = Conditioning(labels, *((conditioner.tokenizer, conditioner.max_length) if text else ()))
        self.rows: list[dict[str, Tensor]] = []
        self.names: list[str] = []
        fault = ""
        for n in range(len(pictures)):
            sample = pictures.sample(n)
            try:
                if self.maps is not None and MAP not in sample.members:
                    raise SampleError("no-map", f"The sample has no {MAP}.")
                self.rows.append(read(sample)[0])
                found.append(n)
            except SampleError as error:
                fault = str(error)
                continue
            if labels is not None:
                self.names.append(labels[int(self.rows[-1]["labels"])])
            else:
                self.names.append(str(sample.record.get("caption") or "") if text else "")
        if not self.rows:
            raise DataError(f"{pictures.index.root} has nothing to tell the model; of its last sample: {fault}")
        rows, self.found = len(self.rows), found
        # Shards are often sorted by class: the first pictures would be of one.
        self.places = [n * rows // count if count < rows else n % rows for n in range(count)]

    def __call__(self, start: int, stop: int) -> tuple[dict[str, Tensor], list[str]]:
        """(what the conditioner is given, in words) for samples `start` … `stop` - 1."""
        places = self.places[start:stop]
        fields = {name: torch.stack([self.rows[n][name] for n in places]) for name in self.rows[0]}
        if self.maps is not None:
            # Read when they are needed: those of a large set would not fit in memory.
            fields["map_pixels"] = torch.stack([_map(self.maps, self.found[n]) for n in places])
        return fields, [self.names[n] for n in places]


def _map(pictures: PictureSet, n: int) -> Tensor:
    """The n-th picture's map, uint8 `[3, S, S]`; raises DataError where it cannot be decoded."""
    try:
        return map_of(pictures.sample(n).members, pictures.spec)
    except SampleError as error:
        raise DataError(f"{pictures.index.root}: the map of sample {pictures.key(n)} is of no use: {error}") from error


def ranges(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each batch of at most `size` out of `count`."""
    return ((start, min(start + size, count)) for start in range(0, count, size))


@dataclass(frozen=True)
class CodeGenerator:
    """A prior with all that it takes to draw pictures from it; stands where `Generator` stands for diffusion.

    Attributes:
        model: in eval mode, on its device.
        sampler: how codes are drawn.
        size: side of the pictures in pixels; more than was trained slides a window.
    """

    model: CodePriorModel
    sampler: CodeSampler
    size: int

    begins: ClassVar[str] = "random codes"
    on_the_way: ClassVar[str] = "written row by row, over random codes"

    @property
    def steps(self) -> int:
        """How often `on_step` is called for a batch: after each row."""
        return self.model.first_stage.side(self.size)

    @torch.no_grad()
    def __call__(
        self, given: dict[str, Tensor], seeds: list[int], on_step: Callable[[Any], None] | None = None
    ) -> Tensor:
        """uint8 `[B, 3, S, S]`: picture b depends on the model, on row b of `given` and on seed b alone."""
        device = self.model.first_stage.latent_mean.device
        told = {name: value.to(device) for name, value in given.items()}
        drawn = uniform(seeds, "codes", (self.steps, self.steps)).to(device)
        condition = self.model.condition(told)
        null = condition
        if self.sampler.guidance != 1:
            null = self.model.condition(told, torch.ones(len(seeds), dtype=torch.bool, device=device))
        rest = self.noise(seeds)

        def on_row(row: int, codes_Bhw: Tensor) -> None:
            if on_step is not None:
                shown = torch.cat([codes_Bhw[:, :row].cpu(), rest[:, row:]], 1)
                on_step(Step(row, self.steps, shown, shown))

        return self.decode(sample_codes(self.model.prior, self.sampler, drawn, condition, null, on_row=on_row))

    def noise(self, seeds: list[int]) -> Tensor:
        """Codes of which all are equally likely, int64 `[B, h, w]` on the CPU: what no prior is worth."""
        drawn = uniform(seeds, "random codes", (self.steps, self.steps))
        return (drawn * self.model.first_stage.quantizer.codes).long()

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Codes on any device → uint8 pictures on the CPU."""
        first_stage = self.model.first_stage
        return to_uint8(first_stage.decode_codes(codes_Bhw.to(first_stage.latent_mean.device))).cpu()


PictureGenerator = Generator | CodeGenerator


def stage_generator(module: Any, data: ShardDataModule, steps: int | None = None) -> PictureGenerator | None:
    """The generator of a stage, with its sampler; None where its model makes no pictures.

    Args:
        module: the stage.
        data: of the run; says the size of the pictures.
        steps: most of a diffusion sampler; None: its own.
    """
    model = module.model
    if isinstance(model, CodePriorModel):
        return CodeGenerator(model, module.sampler, _picture_size(data, model))
    if not isinstance(model, DiffusionModel):
        return None
    sampler = copy(module.sampler)
    sampler.steps = min(sampler.steps, steps or sampler.steps)
    return Generator(model, module.process, sampler, _picture_size(data, model))


def _picture_size(data: ShardDataModule, model: DiffusionModel | CodePriorModel) -> int:
    """Side of the pictures in pixels."""
    collate: Any = data.collate
    if isinstance(collate, LatentCollate):
        return collate.shape[1] * model.first_stage.factor
    if isinstance(collate, CodeCollate):
        return collate.side * model.first_stage.factor
    return collate.image.size
