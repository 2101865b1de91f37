"""The layers of which networks are built: what is checkpointed, and what is gathered together when it is sharded."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmlab.model import code_gpt, dit
from mmlab.model.quantizer import Quantizer

LAYERS = (GradientCheckpointingLayer, code_gpt.Block, dit.Block)
LEVELS = ("down_blocks", "mid_block", "up_blocks")
"""Children of diffusers' networks that are levels of layers, or lists of these."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost layers of transformers, the levels of diffusers' networks, and codebooks, in the modules' order."""
    layers: list[nn.Module] = []
    for name, child in model.named_children():
        if isinstance(child, (*LAYERS, Quantizer)):
            layers.append(child)
        elif name in LEVELS:
            layers += list(child) if isinstance(child, nn.ModuleList) else [child]
        else:
            layers += blocks(child)
    return layers
