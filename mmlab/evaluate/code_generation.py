"""Pictures from a prior over codes. Legend: B pictures, S side in pixels, h/w rows and columns of codes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmlab.diffusion.noise import uniform
from mmlab.diffusion.walk import Step
from mmlab.evaluate.generation import Generator
from mmlab.model.code_prior_model import CodePriorModel
from mmlab.model.code_sampling import CodeSampler, sample_codes
from mmlab.model.first_stage import to_uint8


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
