"""CUDA's float32 operations under a CPU's autocast."""

import torch
from torch import nn

from mmlab.training.cuda_autocast import CudaAutocast


def test_norms_and_losses_run_in_float32():
    norm, x = nn.LayerNorm(8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.mm(x, x.T)
        assert half.dtype == torch.bfloat16 and norm(x.bfloat16()).dtype == torch.bfloat16
        with CudaAutocast():
            assert norm(x.bfloat16()).dtype == half.softmax(-1).dtype == half.exp().dtype == torch.float32
            assert torch.mm(x, x.T).dtype == torch.bfloat16
    with CudaAutocast():
        assert half.softmax(-1).dtype == torch.bfloat16
