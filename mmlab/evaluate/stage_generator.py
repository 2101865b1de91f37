"""What draws pictures from a stage's model while it is trained."""

from copy import copy
from typing import Any

from mmlab.data.code_collate import CodeCollate
from mmlab.data.image_collate import LatentCollate
from mmlab.data.module import ShardDataModule
from mmlab.evaluate.code_generation import CodeGenerator, PictureGenerator
from mmlab.evaluate.generation import Generator
from mmlab.model.code_prior_model import CodePriorModel
from mmlab.model.diffusion_model import DiffusionModel


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
