"""Keeps prefill and decode replicas in proportion: one of them too few would leave the other idle."""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.common.settings import AutoscalingSettings

_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Pair:
    """Numbers of replicas."""

    prefill: int
    decode: int


def in_proportion(wanted: Pair, settings: AutoscalingSettings) -> Pair:
    """The least pair within bounds and ratio that has at least what is wanted; the largest there is, if none has.

    Monotone: more wanted of either never gives less of either.
    """
    bounds, largest = settings.decode, None
    for num_decode in range(bounds.min, bounds.max + 1):
        fewest, most = prefill_range(num_decode, settings)
        if fewest > most:
            continue
        largest = Pair(most, num_decode)
        if num_decode >= wanted.decode and wanted.prefill <= most:
            return Pair(max(wanted.prefill, fewest), num_decode)
    assert largest is not None, "the settings have been checked: some pair is possible"
    return largest


def prefill_range(num_decode: int, settings: AutoscalingSettings) -> tuple[int, int]:
    """Fewest and most prefill replicas beside so many decode replicas; fewest > most: none is possible."""
    fewest = math.ceil(settings.min_prefill_per_decode * num_decode - _EPSILON)
    most = math.floor(settings.max_prefill_per_decode * num_decode + _EPSILON)
    return max(settings.prefill.min, fewest), min(settings.prefill.max, most)
