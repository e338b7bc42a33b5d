"""Times of one turn, as the gateway measures them: the laps before a replica works, the first token, the end."""

from __future__ import annotations

import dataclasses
import time

from services.common.messages import Timings


class Watch:
    """Times of one turn, as the gateway measures them."""

    def __init__(self) -> None:
        self._started_s = self._lap_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._last_token_s = self._started_s
        self._laps = {"session_ms": 0.0, "tokenize_ms": 0.0, "route_ms": 0.0}

    def lap(self, stage: str) -> None:
        """The time since the last lap was spent on this stage; laps are over once the replica works."""
        now_s = time.perf_counter()
        if self._first_token_s is None:
            self._laps[stage] += (now_s - self._lap_s) * 1e3
        self._lap_s = now_s

    def saw_token(self) -> None:
        """Tokens have arrived."""
        self._last_token_s = time.perf_counter()
        if self._first_token_s is None:
            self._first_token_s = self._last_token_s

    def timings(self, replica: Timings) -> Timings:
        """With the replica's share; decode_ms is the gateway's own where the replica has not said."""
        first_s = self._last_token_s if self._first_token_s is None else self._first_token_s
        return dataclasses.replace(
            replica,
            first_token_ms=(first_s - self._started_s) * 1e3,
            decode_ms=replica.decode_ms or (self._last_token_s - first_s) * 1e3,
            total_ms=(time.perf_counter() - self._started_s) * 1e3,
            session_ms=self._laps["session_ms"],
            tokenize_ms=self._laps["tokenize_ms"],
            route_ms=self._laps["route_ms"],
        )
