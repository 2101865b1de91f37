"""Matrix products in fp32 on a CPU: by oneDNN, where the kernels that torch takes are slower.

torch computes them with MKL, which on AMD's processors does without AVX-512: 110 GFLOP/s of a core of an EPYC (Zen 5)
that reaches 245 with oneDNN, which torch has, too, and uses for bf16 and for convolutions.
"""

import math
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError

LEAST = 1 << 24
"""Multiplications of a product from which on oneDNN computes it: it compiles a kernel for each new shape (2 ms)."""
_library: Any = None  # holds the kernels while they are in use


def products(choice: str, accelerator: str) -> str:
    """Resolve `auto`: onednn on CPUs of AMD with AVX-512, else torch.

    Args:
        choice: the setting `trainer.products`.
        accelerator: the setting `trainer.accelerator`.

    Raises:
        ConfigError: this build of torch has no oneDNN.
    """
    runs = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if choice == "onednn" and not runs:
        raise ConfigError("trainer.products=onednn: this build of torch has no oneDNN; leave it out.")
    if choice != "auto":
        return choice
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    mkl = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if runs and mkl and not on_gpu and _vendor() == "AuthenticAMD" else "torch"


def use_products(kind: str) -> None:
    """Let this process compute its matrix products by `onednn`, or by `torch` again."""
    global _library
    if kind == "onednn" and _library is None:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\s*.*[Oo]verrid.*")
            _library.impl("mm", _mm, "CPU")
            _library.impl("addmm", _addmm, "CPU")
    elif kind == "torch" and _library is not None:
        _library._destroy()
        _library = None


def _mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    if _large(a_MK, b_KN):
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
    return torch.mm(a_MK, b_KN, out=a_MK.new_empty(0))  # another operator, whose kernel is torch's


def _addmm(bias: Tensor, a_MK: Tensor, b_KN: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if _large(a_MK, b_KN) and beta == alpha == 1 and bias.shape == b_KN.shape[1:] and bias.dtype == a_MK.dtype:
        # The kernel reads the bias as if its numbers lay one after another.
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), bias.contiguous(), "none", [], "")
    return torch.addmm(bias, a_MK, b_KN, beta=beta, alpha=alpha, out=a_MK.new_empty(0))


def _large(a_MK: Tensor, b_KN: Tensor) -> bool:
    """Whether oneDNN computes a product; torch says what is wrong with one whose shapes do not fit."""
    if not (a_MK.dtype is b_KN.dtype is torch.float32 and a_MK.dim() == b_KN.dim() == 2):
        return False
    return a_MK.shape[1] == b_KN.shape[0] and math.prod(a_MK.shape) * b_KN.shape[1] >= LEAST


def _vendor() -> str:
    """The processor's vendor, as the processor itself states it; empty if this is not Linux on x86."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.exists():
        return ""
    lines = (line.partition(":") for line in info.read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), "")
