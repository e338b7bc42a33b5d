"""Random numbers that depend on (seed, position, token id) and on nothing else.

A counter-based generator: no state, so a request draws the same numbers alone or in a batch, on CPU or on CUDA, before
or after a preemption. The counter is mixed with the splitmix64 finaliser (Steele, Lea, Flood 2014), written in int64
tensor operations that wrap around, so nothing has to cross from host to device but one key a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

_WEYL = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_MASK64 = 2**64 - 1


def stream_key(seed: int, position: int) -> int:
    """The key of the numbers drawn for token `position` of the reply to a request with `seed`; signed 64 bits."""
    return _signed(_mix_int(_mix_int(seed & _MASK64) + position * _WEYL))


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, fp64, one number for each pair of a key and a token id; both int64, broadcast together.

    53 random bits: with fewer, tokens of a large vocabulary tie and the lower ids win.
    """
    bits = _mix_tensor(keys + (token_ids + 1) * _signed(_WEYL))
    uniform = (_shift_right(bits, 11).double() + 0.5) * 2.0**-53
    return uniform.log_().neg_().log_().neg_()


def _mix_int(value: int) -> int:
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        value &= _MASK64
        value = (value ^ (value >> shift)) * multiplier
    value &= _MASK64
    return value ^ (value >> _SHIFTS[-1])


def _mix_tensor(value: Tensor) -> Tensor:
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        value = (value ^ _shift_right(value, shift)) * _signed(multiplier)
    return value ^ _shift_right(value, _SHIFTS[-1])


def _shift_right(value: Tensor, num_bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 would copy the sign bit."""
    return (value >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _signed(value: int) -> int:
    value &= _MASK64
    return value - 2**64 if value >= 2**63 else value


def stream_key_array(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """`stream_key` of each pair: int64 [n]."""
    mixed = _mix_array(np.array([seed & _MASK64 for seed in seeds], np.uint64))
    keys = _mix_array(mixed + np.array(positions, np.uint64) * np.uint64(_WEYL))
    return keys.view(np.int64)


def _mix_array(value: np.ndarray) -> np.ndarray:
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(multiplier)
    mixed: np.ndarray = value ^ (value >> np.uint64(_SHIFTS[-1]))
    return mixed
