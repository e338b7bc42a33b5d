"""The sessions whose KV this replica keeps between their turns: what they are, so that another can take them over."""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeldSession:
    """token_ids: those whose blocks can be found here, in full blocks. used_s: when its last turn ended (monotonic)."""

    digest: str
    token_ids: Sequence[int]
    salt: bytes
    used_s: float


class HeldSessions:
    """Notes each session at the end of its turns. What the pool evicts, or another replica takes up, is not noticed.

    keep_s: a session idle for longer is forgotten. max_tokens: what the pool can hold at most; the ones that have been
    idle longest are forgotten first, as the pool evicts them first.
    """

    def __init__(self, keep_s: float, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep_s = keep_s
        self._max_tokens = max_tokens
        self._clock = clock
        self._sessions: OrderedDict[str, HeldSession] = OrderedDict()  # the longest idle first
        self._num_tokens = 0

    def ended(self, digest: str, token_ids: Sequence[int], salt: bytes) -> None:
        """A turn of the session has ended, and token_ids can be found here."""
        self._forget(digest)
        if not token_ids:
            return
        self._sessions[digest] = HeldSession(digest, array("I", token_ids), salt, self._clock())
        self._num_tokens += len(token_ids)
        while self._num_tokens > self._max_tokens:
            self._forget(next(iter(self._sessions)))

    def recent_first(self) -> tuple[HeldSession, ...]:
        """Those that are worth keeping."""
        self._forget_old()
        return tuple(reversed(self._sessions.values()))

    def num_blocks(self, block_size: int) -> int:
        """That hold what is worth keeping; one that sessions share counts for each."""
        self._forget_old()
        return self._num_tokens // block_size

    def __len__(self) -> int:
        self._forget_old()
        return len(self._sessions)

    def _forget_old(self) -> None:
        oldest_s = self._clock() - self._keep_s
        while self._sessions and (first := next(iter(self._sessions.values()))).used_s < oldest_s:
            self._forget(first.digest)

    def _forget(self, digest: str) -> None:
        session = self._sessions.pop(digest, None)
        if session is not None:
            self._num_tokens -= len(session.token_ids)
