"""Layers that are computed again for the backward pass, so that their inner activations need not be kept."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mmlab.config.errors import ConfigError
from mmlab.model import code_gpt, dit

LAYERS = (GradientCheckpointingLayer, code_gpt.Block, dit.Block)


def checkpoint_activations(model: nn.Module) -> None:
    """Let the layers of transformers keep their inputs alone, and diffusers' networks checkpoint as they do themselves.

    What is computed stays the same, dropout too. Unlike transformers' own switch it also holds for a frozen language
    model in eval mode, which gradients of a connector go through.

    Raises:
        ConfigError: the model has no such layers.
    """
    found = False
    for module in model.modules():
        if isinstance(module, LAYERS):
            module.forward = partial(_recomputed, module.forward)
            found = True
        elif getattr(module, "_supports_gradient_checkpointing", False):  # of diffusers
            module.enable_gradient_checkpointing()  # type: ignore[operator]
            found = True
    if not found:
        raise ConfigError(
            "trainer.gradient_checkpointing=true, but this model has no layers that can be computed again."
        )


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
