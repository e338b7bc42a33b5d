"""The small parts: norm, linear, feed-forward. Parameter names are the checkpoint's.

Shapes: T tokens, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps) over the last dimension; statistics in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Linear(nn.Module):
    """x [T, in] to [T, out], weight [out, in], no bias."""

    def __init__(self, size_in: int, size_out: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up stand in one weight so that they are one product."""

    def __init__(self, size: int, inner: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.gate_up = Linear(size, 2 * inner, dtype, device)
        self.down_proj = Linear(inner, size, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        down: Tensor = self.down_proj(F.silu(gate) * up)
        return down

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Where the checkpoint's tensors go, by their names below this module."""
        gate, up = self.gate_up.weight.data.chunk(2, dim=0)
        return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": self.down_proj.weight.data}
