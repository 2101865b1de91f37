"""Activation checkpointing: layers are computed again in the backward pass, and only their inputs are kept."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmlab.config.errors import ConfigError
from mmlab.model.blocks import LAYERS


def checkpoint_activations(model: nn.Module) -> None:
    """Checkpoint the layers of transformers models and of ours; diffusers' networks use their own checkpointing.

    The computation stays the same, dropout included. Unlike transformers' own switch, this also applies to a frozen
    language model in eval mode, through which a connector's gradients pass.

    Raises:
        ConfigError: the model has no such layers.
    """
    changed = False
    for module in model.modules():
        if isinstance(module, LAYERS):
            module.forward = partial(_recomputed, module.forward)
            changed = True
        elif getattr(module, "_supports_gradient_checkpointing", False):  # of diffusers
            module.enable_gradient_checkpointing()  # type: ignore[operator]
            changed = True
    if not changed:
        raise ConfigError("trainer.gradient_checkpointing=true, but this model has no layers to checkpoint.")


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
