"""Rotary position embedding, interleaved pairs, with YaRN as DeepSeek parametrises it.

YaRN depends on the config alone: the length of the cache never changes the maths.
Shapes: T tokens, R rope dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.engine.config import ModelConfig, YarnConfig


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(head dim), times YaRN's m^2 where the config has mscale_all_dim (DeepSeek-V2, section 2.4 and code)."""
    scale = 1 / math.sqrt(config.qk_head_dim)
    yarn = config.yarn
    if yarn is None or yarn.mscale is None or not yarn.mscale_all_dim:
        return scale
    return scale * _mscale(yarn.factor, yarn.mscale_all_dim) ** 2


class RotaryEmbedding:
    """Tables of cos and sin for positions 0..num_positions-1, fp32 [num_positions, R/2] on `device`."""

    def __init__(self, config: ModelConfig, num_positions: int, device: torch.device) -> None:
        frequencies = _frequencies(config)
        positions = torch.arange(num_positions, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        amplitude = _amplitude(config.yarn)
        self.cos = (angles.cos() * amplitude).to(device)
        self.sin = (angles.sin() * amplitude).to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, R/2] fp32, for int64 positions [T]."""
        return self.cos[positions], self.sin[positions]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pair j, elements (2j, 2j+1) of the last dimension, by its angle; fp32 inside, the dtype of x outside.

    x: [T, R] or [T, H, R]; cos, sin: [T, R/2] fp32.
    """
    if x.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _frequencies(config: ModelConfig) -> Tensor:
    """[R/2] fp32: theta^(-2j/R), blended with its factor-th part below the ramp (YaRN, eq. 17-20)."""
    dim = config.qk_rope_head_dim
    base = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    yarn = config.yarn
    if yarn is None:
        return base
    low = max(math.floor(_turning_dim(yarn.beta_fast, config, yarn)), 0)
    high = min(math.ceil(_turning_dim(yarn.beta_slow, config, yarn)), dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return base / yarn.factor * ramp + base * (1 - ramp)


def _turning_dim(num_turns: float, config: ModelConfig, yarn: YarnConfig) -> float:
    """The (fractional) dimension whose wavelength makes num_turns over the original context."""
    length = yarn.original_max_position_embeddings
    return config.qk_rope_head_dim * math.log(length / (num_turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _amplitude(yarn: YarnConfig | None) -> float:
    """What cos and sin are multiplied by."""
    if yarn is None:
        return 1.0
    if not yarn.mscale or not yarn.mscale_all_dim:
        return _mscale(yarn.factor, 1.0)
    return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
