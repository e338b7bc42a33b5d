"""Steps on made-up tokens that are stored nowhere: as large as they can get, to see how much memory steps take, and of
every kind, so that no kernel is left to be compiled while somebody waits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from services.engine.kernels.draw_tokens import Draws
from services.engine.kernels.mla_prefill import query_tiles
from services.engine.kv_cache import KVCache
from services.engine.step import LongChunks, Step

_FEW_TOKENS = 32
_PREFIX = 4096


def largest_steps(max_num_tokens: int, max_rows: int, cache: KVCache, device: torch.device) -> Iterator[Step]:
    """A prompt of max_num_tokens, with logits of as many rows as can be sampled; and max_rows single tokens.

    Before them a few tokens after a long prefix, beside a single one: the other ways that attention can take.
    """

    def numbers(count: int, value: int = 0) -> Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=device)

    none = numbers(0)
    num_logits = min(max_rows, max_num_tokens)
    bounds = [0, max_num_tokens]
    tiles = torch.from_numpy(query_tiles(bounds, bounds, cache.compute_dtype)).to(device)
    reads_back = cache.layout.dtype != cache.compute_dtype
    long = LongChunks(bounds, bounds, numbers(max_num_tokens) if reads_back else None, tiles)
    rows = torch.arange(num_logits, device=device)
    few, prefix = min(_FEW_TOKENS, max_num_tokens - 1), [0, _PREFIX]
    if few > 0:
        bounds_few = [0, few]
        tiles_few = torch.from_numpy(query_tiles(bounds_few, prefix, cache.compute_dtype)).to(device)
        after_prefix = LongChunks(bounds_few, prefix, numbers(_PREFIX), tiles_few)
        tokens = numbers(1 + few)
        yield Step(tokens, tokens, numbers(1 + few, -1), numbers(1), numbers(1).view(1, 1), 1, after_prefix, rows[:1])
    tokens = numbers(max_num_tokens)
    yield Step(tokens, tokens, numbers(max_num_tokens, -1), none, none.view(0, 1), 0, long, rows)
    tokens = numbers(max_rows)
    yield Step(tokens, tokens, numbers(max_rows, -1), tokens, tokens.view(-1, 1), None, None, None)


def draws_of_all_kinds(logits: Tensor) -> Draws:
    """Every row with a temperature, top-k and top-p."""
    ones = torch.ones(len(logits), device=logits.device)
    return Draws(ones, ones * float("-inf"), (ones * 50).int(), ones * 0.9, ones.long())
