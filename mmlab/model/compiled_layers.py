"""Layers that run compiled (torch.compile) in training steps, each by itself; the rest of a model stays as it is.

A layer is compiled once for its class, not once for each of its copies, and its weights are arguments: checkpoints,
artifacts, adapters and sharding do not see it. Hooks run outside of what is compiled.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from mmlab.config.errors import ConfigError
from mmlab.model.blocks import blocks
from mmlab.model.quantizer import Quantizer
from mmlab.runs.compiler import CACHE
from mmlab.runs.ranks import rank

BACKEND = "inductor"
LIMIT = 16
"""Versions of a layer: for one row or several, each kind of mask, and inputs with and without gradients."""


class CompiledLayers:
    """Lets the layers of a model run compiled while it is `on`; otherwise they run as always.

    Args:
        model: with its parts, filled or not; what is put on them later, such as adapters, is compiled too.

    Attributes:
        on: during the forward and backward pass of a training step. Validation, samples and answers have shapes of
            their own, from single tokens to large batches, for which nothing is compiled.

    Raises:
        ConfigError: the model has no layers to compile.
    """

    def __init__(self, model: nn.Module):
        self.on = False
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        layers = [layer for layer in blocks(model) if not isinstance(layer, Quantizer)]
        if not layers:
            raise ConfigError("trainer.compile=true, but this model has no layers to compile.")
        self.count = len(layers)
        for layer in layers:
            layer.forward = _Forward(self, layer)

    def function(self, layer: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled function of a layer's class.

        Layers of transformers get rows and images of any number and length, and are compiled for all sizes at once.
        Those of image networks get equal batches, and are compiled for their sizes. Neither depends on the order of
        batches, as torch's own choice would (sizes first, all sizes once they change): a resumed run computes the same.
        """
        if plain not in self._compiled:
            if not self._compiled:
                self._begin()
            dynamic = isinstance(layer, GradientCheckpointingLayer)
            # All layers of transformers share the code of one function; isolated, each class has its own limit.
            options: Any = {"isolate_recompiles": True, "recompile_limit": LIMIT}
            self._compiled[plain] = torch.compile(plain, dynamic=dynamic, backend=BACKEND, **options)
        return self._compiled[plain]

    def _begin(self) -> None:
        from torch._inductor import config as inductor_config

        if torch.are_deterministic_algorithms_enabled():
            inductor_config.deterministic = True  # else GPU kernels are chosen by their time
        warnings.filterwarnings("ignore", r"Dynamo detected a call to a `functools.lru_cache`")  # of diffusers
        logger = logging.getLogger("torch._dynamo.convert_frame")
        if not any(isinstance(each, _Limit) for each in logger.filters):
            logger.addFilter(_Limit())
        if rank() == 0:
            cache = os.environ.get(CACHE)
            tqdm.write(f"compiling {self.count} layers, which takes a while; kernels are kept in {cache}")


class _Forward:
    """In place of a layer's `forward`."""

    def __init__(self, layers: CompiledLayers, layer: nn.Module):
        self.layers, self.layer, self.forward = layers, layer, layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.layers.on:
            return self.forward(*args, **kwargs)
        return self.layers.function(self.layer, self.forward.__func__)(self.layer, *args, **kwargs)


class _Limit(logging.Filter):
    """Says in a line of our own that torch will not compile a layer again."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("torch._dynamo hit config."):
            return True
        _, limit, function, reason, _ = record.args  # type: ignore[misc]
        tqdm.write(
            f"WARNING: a layer was compiled for {limit} kinds of inputs, which is the limit, and runs without "
            f"compilation for further ones: {function}, last because {' '.join(str(reason).split())}; "
            "TORCH_LOGS=recompiles shows all.",
            file=sys.stderr,
        )
        return False
