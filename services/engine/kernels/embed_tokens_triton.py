# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Embeddings on CUDA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.engine.kernels.dependent_launch import begin_after_earlier, dependent


def embed_tokens_triton(token_ids: torch.Tensor, sampled_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See `embed_tokens`."""
    num_tokens, size = token_ids.shape[0], table.shape[1]
    out = torch.empty(num_tokens, size, dtype=table.dtype, device=table.device)
    if num_tokens:
        block = min(2048, triton.next_power_of_2(size))
        grid = (num_tokens, triton.cdiv(size, block))
        _embed[grid](token_ids, sampled_ids, table, out, SIZE=size, BLOCK=block, **dependent(out.device))
    return out


@triton.jit
def _embed(token_ids, sampled_ids, table, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, IS_DEPENDENT: tl.constexpr):
    begin_after_earlier(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row)
    if token < 0:
        token = tl.maximum(tl.load(sampled_ids + (-1 - token)), 0)
    numbers = tl.load(table + token.to(tl.int64) * SIZE + d, mask=d < SIZE)
    tl.store(out + row * SIZE + d, numbers, mask=d < SIZE)
