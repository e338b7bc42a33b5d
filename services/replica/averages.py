"""What a replica measures, as moving averages."""

from __future__ import annotations

_WEIGHT_OF_NEW = 0.25


class MovingAverage:
    """Of what was recorded, the latest weighing most; `value` is None before anything was."""

    def __init__(self) -> None:
        self.value: float | None = None

    def record(self, value: float) -> None:
        """One more measurement."""
        self.value = value if self.value is None else self.value + _WEIGHT_OF_NEW * (value - self.value)
