"""Steps on made-up tokens that are stored nowhere: as large as they can get, to see how much memory steps take, and of
every kind, so that no kernel is left to be compiled while somebody waits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from services.engine.kernels.draw_tokens import Draws
from services.engine.kernels.mla_prefill import PrefillWork
from services.engine.mixed_step import AttentionCut
from services.engine.step import LongChunks, Step

_FEW_TOKENS = 32
_PREFIX = 4096


def largest_steps(max_num_tokens: int, max_rows: int, cut: AttentionCut, device: torch.device) -> Iterator[Step]:
    """A prompt of max_num_tokens, with logits of as many rows as can be sampled; and max_rows single tokens.

    Before them a few tokens after a long prefix, beside a single one: the other ways that attention can take.
    """

    def numbers(count: int, value: int = 0) -> Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=device)

    def long(first: int, num_queries: int, num_keys: int, *, reads: bool) -> LongChunks:
        cu_q, cu_k = [first, first + num_queries], [0, num_keys]
        work = PrefillWork.of(cu_q, cu_k, cut.num_heads, cut.dtype, device)
        return LongChunks(cu_q, cu_k, numbers(num_keys) if reads else None, None, work)

    none = numbers(0)
    num_logits = min(max_rows, max_num_tokens)
    rows = torch.arange(num_logits, device=device)
    few = min(_FEW_TOKENS, max_num_tokens - 1)
    if few > 0:
        tokens, one = numbers(1 + few), numbers(1)
        prefix = long(1, few, _PREFIX, reads=True)
        yield Step(tokens, tokens, numbers(1 + few, -1), one, one.view(1, 1), 1, prefix, rows[:1])
    tokens = numbers(max_num_tokens)
    whole = long(0, max_num_tokens, max_num_tokens, reads=cut.reads_back)
    yield Step(tokens, tokens, numbers(max_num_tokens, -1), none, none.view(0, 1), 0, whole, rows)
    tokens = numbers(max_rows)
    yield Step(tokens, tokens, numbers(max_rows, -1), tokens, tokens.view(-1, 1), None, None, None)


def draws_of_all_kinds(logits: Tensor) -> Draws:
    """Every row with a temperature, top-k and top-p."""
    ones = torch.ones(len(logits), device=logits.device)
    return Draws(ones, ones * float("-inf"), (ones * 50).int(), ones * 0.9, ones.long())
