"""Token ids to text while they arrive: whole characters only, and nothing that may yet become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from services.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one reply. Everything pushed, then `finish()`, joined together is `tokenizer.decode` of all ids.

    With stop strings the text ends before the first one to be completed (of several completed by the same character,
    the longest). Work per token is constant on average: each stop string is followed by an automaton.

    Attributes: stopped (a stop string was found; later tokens are ignored), num_tokens_used (how many of the pushed
    tokens count as the reply: up to and including the one that completed the stop string).
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips_special_tokens = skip_special_tokens
        # The decoder holds back incomplete UTF-8 and turns invalid bytes into U+FFFD.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._followers = [_StopFollower(text) for text in stop]
        self._held = ""
        self.stopped = False
        self.num_tokens_used = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain after these tokens; may be empty."""
        pieces: list[str] = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens_used += 1
            if self._skips_special_tokens and self._tokenizer.is_special(token_id):
                continue
            pieces.append(self._release(self._decoder.decode(self._tokenizer.token_bytes(token_id))))
        return "".join(pieces)

    def finish(self) -> str:
        """What was held back: a half character (as U+FFFD), or the beginning of a stop string. Empty after a stop."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        """The part of held + text that cannot belong to a stop string any more."""
        if not self._followers:
            return text
        waiting = self._held + text
        for index, char in enumerate(text, start=len(self._held) + 1):
            completed = [len(f.stop) for f in self._followers if f.advance(char)]
            if completed:
                self.stopped = True
                self._held = ""
                return waiting[: index - max(completed)]
        num_held = max(follower.num_matched for follower in self._followers)
        self._held = waiting[len(waiting) - num_held :]
        return waiting[: len(waiting) - num_held]


class _StopFollower:
    """How much of one stop string the text ends with (Knuth, Morris, Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._fallback = [0] * (len(stop) + 1)  # of each matched length, the next shorter one that also fits
        matched = 0
        for position in range(1, len(stop)):
            while matched and stop[position] != stop[matched]:
                matched = self._fallback[matched]
            matched += stop[position] == stop[matched]
            self._fallback[position + 1] = matched

    def advance(self, char: str) -> bool:
        """Take one more character; True if the stop string is complete."""
        while self.num_matched and char != self.stop[self.num_matched]:
            self.num_matched = self._fallback[self.num_matched]
        self.num_matched += char == self.stop[self.num_matched]
        return self.num_matched == len(self.stop)
