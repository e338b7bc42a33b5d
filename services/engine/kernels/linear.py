"""x times a weight. A few rows are a matter of reading the weight: a kernel of our own does it faster than cuBLAS."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Up to here our own product is the faster one.
FEW_ROWS = 2


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, in] times weight [out, in], as [T, out]; sums in fp32 (float64 for float64)."""
    if x.is_cuda and len(x) <= FEW_ROWS:
        from services.engine.kernels.linear_triton import linear_few_rows

        return linear_few_rows(x, weight)
    return F.linear(x, weight)


def linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`linear` in plain PyTorch."""
    return F.linear(x, weight)
