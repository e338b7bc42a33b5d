"""Linear layers straight from a checkpoint's block-scaled FP8 weights (W8A8).

T tokens, N outputs, K inputs. A weight's scale covers 128 x 128 numbers, an activation's 128 channels of one token;
ragged edges keep the // 128 rule (576 rows have 5 row blocks, the last of 64). `scale_inv` multiplies, despite the
name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SCALE_BLOCK = 128
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4


def dequantize(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] e4m3 with [ceil(N / 128), ceil(K / 128)] fp32 scales to [N, K] of `dtype`; rounds once."""
    rows, columns = weight.shape
    scales = scale_inv.repeat_interleave(SCALE_BLOCK, 0)[:rows].repeat_interleave(SCALE_BLOCK, 1)[:, :columns]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return (weight.to(exact) * scales.to(exact)).to(dtype)


def quantize_activations(
    x: torch.Tensor, round_scales_to_power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, K] to e4m3 [T, K] and fp32 scales [T, ceil(K / 128)]: s = max(|x|, 1e-4) / 448 over 128 channels."""
    tokens, channels = x.shape
    padded = F.pad(x.float(), (0, -channels % SCALE_BLOCK)).view(tokens, -1, SCALE_BLOCK)
    largest = padded.abs().amax(-1).clamp_(min=SMALLEST_AMAX)
    # By a tensor: CUDA divides by a Python number as a product with its reciprocal, which rounds differently.
    scales = largest / largest.new_full((), E4M3_MAX)
    if round_scales_to_power_of_two:
        mantissas, exponents = torch.frexp(scales)
        # frexp's mantissa is in [0.5, 1): exactly 0.5 is already a power of two.
        scales = torch.ldexp(torch.ones_like(scales), exponents - (mantissas == 0.5).int())
    quantized = (padded / scales.unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return quantized.view(tokens, -1)[:, :channels], scales


def fake_quantize_activations(x: torch.Tensor, round_scales_to_power_of_two: bool = False) -> torch.Tensor:
    """[T, K] fp32: what is left of x after `quantize_activations`."""
    quantized, scales = quantize_activations(x, round_scales_to_power_of_two)
    return quantized.float() * scales.repeat_interleave(SCALE_BLOCK, 1)[:, : x.shape[1]]


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor, round_scales_to_power_of_two: bool = False
) -> torch.Tensor:
    """x [T, K] times e4m3 weight [N, K] with scales [ceil(N / 128), ceil(K / 128)], as [T, N] in x's dtype.

    Activations are quantised to e4m3 by token and 128 channels, products are summed in fp32.
    `round_scales_to_power_of_two` rounds the activations' scales up (a checkpoint's `scale_fmt: ue8m0`).
    """
    if x.is_cuda:
        from services.engine.kernels.fp8_linear_triton import fp8_linear_triton

        return fp8_linear_triton(x, weight, scale_inv, round_scales_to_power_of_two)
    return fp8_linear_reference(x, weight, scale_inv, round_scales_to_power_of_two)


def fp8_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor, round_scales_to_power_of_two: bool = False
) -> torch.Tensor:
    """`fp8_linear` in plain PyTorch, in fp32."""
    activations = fake_quantize_activations(x, round_scales_to_power_of_two)
    return F.linear(activations, dequantize(weight, scale_inv, torch.float32)).to(x.dtype)
