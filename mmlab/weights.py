"""The weights of a module: filled strictly, and identified by a fingerprint."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError

CHUNK = 1 << 24
"""Values that are copied and hashed at a time."""


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


def content_hash(module: nn.Module) -> str:
    """SHA-256 over the names, shapes and all values of a module's state dict.

    It is the identity of weights as they were read. A part may be stored in fewer bits than it is read in, so bf16,
    fp16 and fp8 values are hashed as the fp32 numbers that they are: the hash does not depend on the device, the memory
    layout, or a lossless widening. It does depend on rounding: a part that is trained or used in bf16 is hashed before
    it is cast. One core hashes about 2 GB/s, in which case 7 billion parameters take 14 s; tensors are shared among
    the cores.
    """
    state = sorted(module.state_dict().items())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(_tensor_digest, [tensor for _, tensor in state])
        facts = [f"{name} {list(tensor.shape)} {digest}" for (name, tensor), digest in zip(state, digests, strict=True)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values, floating-point ones of at most 32 bits as fp32."""
    widened = tensor.dtype.is_floating_point and tensor.dtype != torch.float64
    dtype = torch.float32 if widened else tensor.dtype
    digest = hashlib.sha256(str(dtype).encode())
    for chunk in tensor.detach().reshape(-1).split(CHUNK):
        digest.update(chunk.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
