"""Token ids to embeddings, where an id may still be on the device, sampled by the step before.

T tokens, D model, B rows that were sampled last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def embed_tokens(token_ids: torch.Tensor, sampled_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """token_ids [T] int32 to rows of table [vocabulary, D]: [T, D].

    A negative id -1 - b stands for sampled_ids[b] ([B] int32, 0 where no token could be sampled and it is negative).
    """
    if table.is_cuda:
        from services.engine.kernels.embed_tokens_triton import embed_tokens_triton

        return embed_tokens_triton(token_ids, sampled_ids, table)
    return embed_tokens_reference(token_ids, sampled_ids, table)


def embed_tokens_reference(token_ids: torch.Tensor, sampled_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`embed_tokens` in plain PyTorch."""
    sampled = sampled_ids[(-1 - token_ids.long()).clamp_min(0)]
    return F.embedding(torch.where(token_ids < 0, sampled.clamp_min(0), token_ids), table)
