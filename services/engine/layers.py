"""The small parts: norm, linear, feed-forward. Parameter names are the checkpoint's.

Shapes: T tokens, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.engine.kernels.fp8_linear import SCALE_BLOCK, fp8_linear


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps) over the last dimension; statistics in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class PackedWeight:
    """A weight [out, in] in the order that oneDNN's matrix product reads: 1.1 to 1.9 times as fast on a CPU.

    The operators are those that torch.compile emits for CPUs; `is_available` says whether this build has them, and this
    CPU the instructions that they need for a type.
    """

    _BATCH_HINT = 64  # rows that the layout is made for; others work as well

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self._BATCH_HINT)

    @staticmethod
    def is_available(dtype: torch.dtype) -> bool:
        operators = torch.ops.mkldnn
        if not (torch.backends.mkldnn.is_available() and hasattr(operators, "_reorder_linear_weight")):
            return False
        if dtype == torch.bfloat16:
            return bool(operators._is_mkldnn_bf16_supported())
        return dtype != torch.float16 or bool(operators._is_mkldnn_fp16_supported())

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] to [T, out]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, None, "none", [], "")
        return out


class Linear(nn.Module):
    """x [T, in] to [T, out], weight [out, in], no bias."""

    def __init__(self, size_in: int, size_out: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in, dtype=dtype, device=device), requires_grad=False)
        self._packed: PackedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self._packed is None else self._packed(x)

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    def pack(self, *, keeps_weight: bool = False) -> None:
        """For a CPU, once the weight is loaded: the plain weight is dropped unless it is needed elsewhere."""
        self._packed = PackedWeight(self.weight)
        if not keeps_weight:
            self.weight.data = self.weight.data.new_empty(0)


class Fp8Linear(nn.Module):
    """x [T, in] to [T, out] from an e4m3 weight and its 128x128 block scales; activations are quantised too (W8A8)."""

    def __init__(self, size_in: int, size_out: int, device: torch.device | str, *, rounds_scales: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(size_out, size_in, dtype=torch.float8_e4m3fn, device=device), requires_grad=False
        )
        blocks = (-(-size_out // SCALE_BLOCK), -(-size_in // SCALE_BLOCK))
        self.weight_scale_inv = nn.Parameter(torch.empty(blocks, device=device), requires_grad=False)
        self._rounds_scales = rounds_scales

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.weight_scale_inv, self._rounds_scales)


class Fp8MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), each straight from its FP8 weight."""

    def __init__(self, size: int, inner: int, device: torch.device | str, *, rounds_scales: bool) -> None:
        super().__init__()
        self.gate_proj = Fp8Linear(size, inner, device, rounds_scales=rounds_scales)
        self.up_proj = Fp8Linear(size, inner, device, rounds_scales=rounds_scales)
        self.down_proj = Fp8Linear(inner, size, device, rounds_scales=rounds_scales)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


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
