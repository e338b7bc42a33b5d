"""How fast steps go: what routing and the prefill decision compare."""

from __future__ import annotations

from collections.abc import Sequence as ListLike

from services.engine.scheduler import Chunk

_WEIGHT_OF_NEW = 0.2
# Fewer new tokens than this say more about the overhead of a step than about the speed of prefill.
_MIN_PREFILL_TOKENS = 16


class Rates:
    """Moving averages, tokens a second; None until measured. A step counts as prefill if a chunk is long enough.

    num_prefilled_tokens: of all steps that counted as prefill.
    """

    def __init__(self) -> None:
        self.prefill_tokens_per_s: float | None = None
        self.decode_tokens_per_s: float | None = None
        self.num_prefilled_tokens = 0

    def record(self, chunks: ListLike[Chunk], elapsed_s: float) -> None:
        """A step with these chunks took so long."""
        longest = max(chunk.num_tokens for chunk in chunks)
        rate = sum(chunk.num_tokens for chunk in chunks) / max(elapsed_s, 1e-9)
        if longest >= _MIN_PREFILL_TOKENS:
            self.num_prefilled_tokens += sum(chunk.num_tokens for chunk in chunks)
            self.prefill_tokens_per_s = _blend(self.prefill_tokens_per_s, rate)
        elif longest == 1:
            self.decode_tokens_per_s = _blend(self.decode_tokens_per_s, rate)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT_OF_NEW * (new - old)
