"""CUDA's autocast where there is no GPU: the operations that it runs in float32, and a CPU's autocast in bf16."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# Of torch.amp's list "CUDA ops that can autocast to float32", those that networks use.
IN_FP32 = {
    *(F.layer_norm, F.group_norm, F.cosine_similarity, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.nll_loss),
    *(F.cross_entropy, F.kl_div, F.softplus, F.softmax, F.log_softmax, F.gaussian_nll_loss),
    *(torch.layer_norm, torch.group_norm, torch.softmax, torch.log_softmax),
    *(torch.exp, torch.log, torch.pow, torch.prod, torch.sum, torch.cumsum, torch.rsqrt, torch.norm, torch.reciprocal),
    *(Tensor.softmax, Tensor.log_softmax, Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.prod, Tensor.sum),
    *(Tensor.cumsum, Tensor.rsqrt, Tensor.norm, Tensor.reciprocal),
}


class CudaAutocast(TorchFunctionMode):
    """Within bf16 autocast on the CPU, casts to float32 what CUDA's autocast would cast."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in IN_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_float32, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
