"""The weights of a module: filled strictly, and identified by a fingerprint."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Fill a module with weights of the same names and shapes, strictly.

    A module on the meta device takes over the tensors; another one copies them. Dtypes and `requires_grad` stay.

    Args:
        module: the module.
        weights: tensors by name.
        source: where they come from, for messages.

    Raises:
        ConfigError: other names or shapes.
    """
    own = module.state_dict()
    for key in sorted(weights.keys() | own.keys()):
        stored = list(weights[key].shape) if key in weights else "nothing"
        needed = list(own[key].shape) if key in own else "nothing"
        if stored != needed:
            raise ConfigError(f"{source} does not fit the model: {key} is {stored} there and {needed} here.")
    assign = any(tensor.is_meta for tensor in own.values())
    if assign:
        weights = {key: tensor.to(own[key].dtype) for key, tensor in weights.items()}
    module.load_state_dict(weights, assign=assign)


def fingerprint(module: nn.Module) -> str:
    """Hash of a module's weights: names, shapes and 1,024 values spread over each tensor, as fp32.

    Sampling keeps it to a fraction of a second at 7 billion parameters. It distinguishes checkpoints; it does not
    protect against tampering. It does not change when a part is cast to bf16 and was stored in bf16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        # An odd step, or a matrix of even width would be sampled in a few columns only.
        step = max(1, flat.numel() // 1024) | 1
        digest.update(flat[::step].to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
