"""What a replica measures about itself and its links."""

from __future__ import annotations

import statistics
from collections import deque

_NUM_KEPT = 9


class Measured:
    """The median of the last few measurements; `value` is None before there is one.

    The very first is left out: it pays for connections. So are outliers, by the median: a value that is far too high
    would keep others from measuring it again.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_NUM_KEPT)
        self._is_first = True

    @property
    def value(self) -> float | None:
        return statistics.median(self._recent) if self._recent else None

    def record(self, value: float) -> None:
        """One more measurement."""
        if not self._is_first:
            self._recent.append(value)
        self._is_first = False
