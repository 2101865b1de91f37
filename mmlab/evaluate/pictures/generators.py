"""Images from generative models: diffusion models and code priors.

Legend: B images, C/h/w latents or rows and columns of codes, H/W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmlab.data.aspects import Shape
from mmlab.data.sample_types import ImageSpec
from mmlab.diffusion.process import NoiseProcess
from mmlab.diffusion.samplers import Sampler
from mmlab.diffusion.walk import Source, Step
from mmlab.evaluate.pictures.source_images import IMAGE, MASK, read_image
from mmlab.keyed import normal, uniform
from mmlab.model.code_prior_model import CodePriorModel
from mmlab.model.code_sampling import CodeSampler, sample_codes
from mmlab.model.denoiser import DiffusionModel
from mmlab.model.first_stage import to_signed, to_uint8

OnStep = Callable[[Any], None]
"""Called after each step with a `Step`."""


class PictureGenerator(ABC):
    """A generative model with everything needed to draw images from it.

    Attributes:
        model: in eval mode, on its device.
        shape: of the images.
    """

    model: Any
    sampler: Any
    shape: Shape
    start_label: ClassVar[str]
    strip_title: ClassVar[str]

    @property
    @abstractmethod
    def steps(self) -> int:
        """How often `on_step` is called for a batch."""

    @abstractmethod
    def noise(self, seeds: list[int]) -> Tensor:
        """The states that drawing from noise starts from, one for each seed."""

    def start(self, inputs: dict[str, Tensor], seeds: list[int]) -> Tensor:
        """The states that drawing starts from."""
        return self.noise(seeds)

    @abstractmethod
    def draw(self, inputs: dict[str, Tensor], seeds: list[int], on_step: OnStep | None) -> Tensor:
        """The final states, from inputs of the conditioner on the model's device."""

    @abstractmethod
    def pixels(self, states: Tensor) -> Tensor:
        """States on the model's device, decoded to images within ±1."""

    @property
    def device(self) -> torch.device:
        return self.model.first_stage.latent_mean.device

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], seeds: list[int], on_step: OnStep | None = None) -> Tensor:
        """uint8 images `[B, 3, H, W]`; image b depends only on the model, row b of the inputs and seed b.

        Args:
            inputs: of the model's conditioner, see `conditions`; of a diffusion model also those of `source_images`.
            seeds: one for each image.
            on_step: see `OnStep`.
        """
        return self.decode(self.draw({name: value.to(self.device) for name, value in inputs.items()}, seeds, on_step))

    @torch.no_grad()
    def decode(self, states: Tensor) -> Tensor:
        """States on any device → uint8 images on the CPU."""
        return to_uint8(self.pixels(states.to(self.device))).cpu()


@dataclass(frozen=True)
class DiffusionGenerator(PictureGenerator):
    """Draws images from a diffusion model; states are normalized latents, float32 `[B, C, h, w]`.

    Attributes:
        strength: share of the steps that are taken from images to start from, if there are some.
    """

    model: DiffusionModel
    process: NoiseProcess
    sampler: Sampler
    shape: Shape
    strength: float = 1.0

    start_label: ClassVar[str] = "x_T: noise"
    strip_title: ClassVar[str] = "x_t from noise to image, decoded"

    @property
    def steps(self) -> int:
        return steps_from(self.sampler.config.steps, self.strength)

    def noise(self, seeds: list[int]) -> Tensor:
        first_stage = self.model.first_stage
        sides = map(first_stage.side, self.shape)
        return normal(seeds, (first_stage.channels, *sides), "start").to(self.device)

    @torch.no_grad()
    def start(self, inputs: dict[str, Tensor], seeds: list[int]) -> Tensor:
        noise, source = self.noise(seeds), self.source({name: value.to(self.device) for name, value in inputs.items()})
        if source is None:
            return noise
        config = self.sampler.config
        return source.start(self.process.grid(config.steps, config.spacing)[source.skipped], noise)

    def source(self, inputs: dict[str, Tensor]) -> Source | None:
        """What drawing starts from, of inputs on the model's device: latents of `IMAGE`, and `MASK` for them.

        A latent is drawn if the mask has one of its pixels.
        """
        if IMAGE not in inputs:
            return None
        first_stage = self.model.first_stage
        x_0 = first_stage.normalized(first_stage.encode(to_signed(inputs[IMAGE])).mean)
        mask = inputs.get(MASK)
        mask = None if mask is None else F.max_pool2d(mask.float(), first_stage.factor)
        return Source(x_0, self.sampler.config.steps - self.steps, mask)

    def draw(self, inputs: dict[str, Tensor], seeds: list[int], on_step: OnStep | None) -> Tensor:
        x, source = self.noise(seeds), self.source(inputs)
        condition = self.model.conditioner({name: inputs[name] for name in inputs if name not in (IMAGE, MASK)})
        null = self.model.conditioner.null(len(seeds), x.device)
        options = {"rng": seeds, "on_step": on_step, "source": source}
        return self.sampler(self.model, self.process, x, condition=condition, null=null, **options)

    def pixels(self, states: Tensor) -> Tensor:
        return self.model.first_stage.decode(self.model.first_stage.raw(states))


@dataclass(frozen=True)
class CodeGenerator(PictureGenerator):
    """Draws square images from a prior over codes; states are codes, int64 `[B, h, w]`.

    Images larger than the trained ones are drawn through a sliding window. `on_step` is called after each row.
    """

    model: CodePriorModel
    sampler: CodeSampler
    shape: Shape

    start_label: ClassVar[str] = "random codes"
    strip_title: ClassVar[str] = "drawn row by row, over random codes"

    @property
    def steps(self) -> int:
        return self.model.first_stage.side(self.shape[0])

    def noise(self, seeds: list[int]) -> Tensor:
        """Uniformly distributed codes, on the CPU: the baseline without a prior."""
        drawn = uniform(seeds, "random codes", (self.steps, self.steps))
        return (drawn * self.model.first_stage.quantizer.codes).long()

    def draw(self, inputs: dict[str, Tensor], seeds: list[int], on_step: OnStep | None) -> Tensor:
        drawn = uniform(seeds, "codes", (self.steps, self.steps)).to(self.device)
        condition = null = self.model.condition(inputs)
        if self.sampler.config.guidance != 1:
            null = self.model.condition(inputs, torch.ones(len(seeds), dtype=torch.bool, device=self.device))
        rest = self.noise(seeds)

        def on_row(row: int, codes_Bhw: Tensor) -> None:
            if on_step is not None:
                shown = torch.cat([codes_Bhw[:, :row].cpu(), rest[:, row:]], 1)
                on_step(Step(row, self.steps, shown, shown))

        return sample_codes(self.model.prior, self.sampler, drawn, condition, null, on_row=on_row)

    def pixels(self, states: Tensor) -> Tensor:
        return self.model.first_stage.decode_codes(states)


def steps_from(steps: int, strength: float) -> int:
    """The steps that are taken from an image: the last `strength` · `steps`, rounded down as in diffusers."""
    return int(steps * strength)


def picture_generator(
    model: Any, sampler: Any, process: NoiseProcess | None = None, *, size: int | Shape, strength: float = 1.0
) -> PictureGenerator:
    """The generator of a trained model.

    Args:
        model: a diffusion model or a prior over codes, in eval mode, on its device.
        sampler: `Sampler` or `CodeSampler`.
        process: the one that a diffusion model was trained with; None for a prior.
        size: side of square images in pixels, or of a diffusion model height and width.
        strength: of a diffusion model, see `DiffusionGenerator`.
    """
    shape = (size, size) if isinstance(size, int) else size
    if process is None:
        return CodeGenerator(model, sampler, shape)
    return DiffusionGenerator(model, process, sampler, shape, strength)


GENERATIVE = (DiffusionModel, CodePriorModel)
"""Models that a stage can generate images with."""


def stage_generator(module: Any, data: Any, steps: int | None = None) -> PictureGenerator:
    """The generator of a stage with its own sampler.

    Args:
        module: a stage whose model is `GENERATIVE`.
        data: data module of the run, whose settings have the size of the images.
        steps: maximum number of steps of a diffusion sampler; None: its own.
    """
    sampler = module.sampler
    if steps is not None and isinstance(sampler, Sampler):
        sampler = Sampler(replace(sampler.config, steps=min(sampler.config.steps, steps)), sampler.clip)
    return picture_generator(module.model, sampler, getattr(module, "process", None), size=data.config.size)


def conditions(
    conditioner: Any, requests: Sequence[str | int], count: int, spec: ImageSpec | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """(inputs of the conditioner, labels) for `count` images.

    Args:
        conditioner: of a generative model.
        requests: what the images show in turn: classes (empty: spread over all), texts, or files of maps.
        count: number of images.
        spec: how maps are decoded.

    Raises:
        ConfigError: a class that the model does not have, or a map that is not an image.
    """
    if conditioner.reads == "class":
        few = np.linspace(0, len(conditioner.names) - 1, min(count, len(conditioner.names))).round().astype(int)
        numbers = [conditioner.index(name) for name in requests] or few.tolist()
        numbers = [numbers[n % len(numbers)] for n in range(count)]
        return {"labels": torch.tensor(numbers)}, [conditioner.names[number] for number in numbers]
    if conditioner.reads == "text":
        texts = [str(requests[n % len(requests)]) for n in range(count)]
        return conditioner.tokenize(texts), texts
    if conditioner.reads == "map":
        assert spec is not None
        maps = [read_image(f"map={name}", name, spec) for name in requests]
        names = [Path(str(name)).name for name in requests]
        turns = [n % len(requests) for n in range(count)]
        return {"map_pixels": torch.stack([maps[n] for n in turns])}, [names[n] for n in turns]
    return {}, [""] * count


def ranges(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each batch of at most `size` out of `count`."""
    return ((start, min(start + size, count)) for start in range(0, count, size))
