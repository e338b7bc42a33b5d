"""From what a moment needs to a number of replicas that stands still while the load does."""

from __future__ import annotations

import math
from collections import deque

_EPSILON = 1e-9


class Steady:
    """Up at the first sight (or after up_window_s of it), down only after down_window_s in which less was enough.

    Two thresholds keep it from oscillating: more replicas when the need exceeds those there are, fewer when those that
    would be left were loaded to down_margin of their targets at most. max_step_down: replicas given up at once.
    Used with times of one clock that only goes forward.
    """

    def __init__(
        self, *, up_window_s: float, down_window_s: float, down_margin: float, max_step_down: int | None = None
    ) -> None:
        self._up_window_s = up_window_s
        self._down_window_s = down_window_s
        self._down_margin = down_margin
        self._max_step_down = max_step_down
        self._seen: deque[tuple[float, int, int]] = deque()  # time, enough to serve it, enough to scale down to
        self._target: int | None = None
        self._settled_since_s = 0.0

    def target(self, now_s: float, needed: float, current: int, least: int, most: int) -> int:
        """How many there should be: within least to most, whatever is needed."""
        if current != self._target:  # somebody else has changed it, or this is the first look
            self._settled_since_s = now_s
        enough = math.ceil(needed - _EPSILON)
        comfortable = math.ceil(needed / self._down_margin - _EPSILON)
        self._seen.append((now_s, enough, comfortable))
        while self._seen[0][0] < now_s - max(self._up_window_s, self._down_window_s):
            self._seen.popleft()
        target = min(max(self._wanted(now_s, current), least), most)
        if target != current:
            self._settled_since_s = now_s
        self._target = target
        return target

    def held(self, target: int) -> None:
        """Another number than the last `target` was decided on in the end."""
        self._target = target

    def _wanted(self, now_s: float, current: int) -> int:
        up = min(enough for _, enough, _ in self._within(now_s, self._up_window_s))
        if up > current and now_s - self._seen[0][0] >= self._up_window_s - _EPSILON:
            return up
        down = max(comfortable for _, _, comfortable in self._within(now_s, self._down_window_s))
        if down < current and now_s - self._settled_since_s >= self._down_window_s - _EPSILON:
            step = current - down if self._max_step_down is None else min(current - down, self._max_step_down)
            return current - step
        return current

    def _within(self, now_s: float, window_s: float) -> list[tuple[float, int, int]]:
        return [each for each in self._seen if each[0] >= now_s - window_s - _EPSILON]
