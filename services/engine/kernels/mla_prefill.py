"""Causal attention of new tokens over their sequence, with keys and values expanded to heads, for prefill.

Tq, Tk tokens, H heads, N nope, R rope, V value head; several sequences side by side without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from services.engine.kernels.multiprocessors import num_multiprocessors

# Keys that are worth a part of their own, and most parts of them.
_KEYS_A_PART = 1024
MAX_PARTS = 16


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """What there is to attend, on the device: a captured graph can be given other work each time.

    tiles: int32 [tiles, 4], see `query_tiles`. counts: int32 [6], see `work_counts`; tiles beyond theirs are not read.
    may_split: whether there may be more than one part.
    """

    tiles: torch.Tensor
    counts: torch.Tensor
    may_split: bool

    @classmethod
    def of(
        cls, cu_q: list[int], cu_k: list[int], num_heads: int, dtype: torch.dtype, device: torch.device
    ) -> PrefillWork:
        """The work of sequences with these bounds, sent to the device."""
        tiles = query_tiles(cu_q, cu_k, dtype)
        counts = work_counts(cu_q, cu_k, len(tiles), num_heads, num_multiprocessors(device))
        return cls(torch.from_numpy(tiles).to(device), torch.from_numpy(counts).to(device), is_split(counts))


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    cu_q: list[int],
    cu_k: list[int],
    work: PrefillWork | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q [Tq, H, N + R] over keys k [Tk, H, N], k_rope [Tk, R] and values v [Tk, H, V], as [Tq, H, V].

    All heads share the roped part of their keys. The result has q's dtype; `out` takes it if given.

    Sequence i owns the queries cu_q[i]:cu_q[i + 1] and the keys cu_k[i]:cu_k[i + 1]. It has at least as many keys as
    queries; its queries are the last of its tokens: each sees the keys up to its own (the prefix was computed before).
    Queries before cu_q[0] are not for this function: their rows of the result stay as they are.
    work: of these sequences; all layers of a step share it. On CUDA it alone says which sequences there are.
    """
    if out is None:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
    if q.is_cuda:
        from services.engine.kernels.mla_prefill_triton import mla_prefill_triton

        work = work or PrefillWork.of(cu_q, cu_k, q.shape[1], q.dtype, q.device)
        return mla_prefill_triton(q, k, k_rope, v, scale, work, out)
    return mla_prefill_sdpa(q, k, k_rope, v, scale, cu_q, cu_k, out)


def queries_a_tile(dtype: torch.dtype) -> int:
    """How many queries of one sequence the CUDA kernel takes at a time."""
    return 16 if dtype == torch.float32 else 128


def query_tiles(cu_q: list[int], cu_k: list[int], dtype: torch.dtype) -> np.ndarray:
    """[tiles, 4] int32 by falling work: first query, end of queries, first key, last key that query i sees minus i."""
    step = queries_a_tile(dtype)
    tiles = [np.zeros((0, 4), np.int32)]
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        firsts = np.arange(q0, q1, step, dtype=np.int32)
        ends, starts, shifts = (np.full_like(firsts, number) for number in (q1, k0, k1 - q1))
        tiles.append(np.stack((firsts, ends, starts, shifts), axis=1))
    rows = np.concatenate(tiles)
    ordered: np.ndarray = rows[np.argsort(rows[:, 2] - rows[:, 0] - rows[:, 3], kind="stable")]
    return ordered


def work_counts(cu_q: list[int], cu_k: list[int], num_tiles: int, num_heads: int, num_sms: int) -> np.ndarray:
    """[6] int32: keys, tiles, parts that each tile's keys are split into, heads at a time, first and end of queries.

    Parts: as many as the card can work on at once, none too short. Heads at a time: enough to fill the card twice; the
    fewer, the longer their keys stay in the L2 cache.
    """
    longest = max((end - start for start, end in pairwise(cu_k)), default=0)
    parts = min(max_parts(num_heads * max(1, num_tiles), num_sms), _power_of_two(longest // _KEYS_A_PART))
    heads_at_once = 1 << (-(-2 * num_sms // max(1, num_tiles)) - 1).bit_length()
    return np.array([cu_k[-1], num_tiles, parts, min(num_heads, heads_at_once), cu_q[0], cu_q[-1]], np.int32)


def is_split(counts: np.ndarray) -> bool:
    """Whether there is more than one part."""
    return int(counts[2]) > 1


def max_parts(num_programs: int, num_sms: int) -> int:
    """Parts that so many programs can be split into, for the card to work on all of them at once."""
    return _power_of_two(min(num_sms // num_programs, MAX_PARTS))


def _power_of_two(number: int) -> int:
    """The largest one up to a number; at least 1."""
    return 1 << max(1, number).bit_length() - 1


def mla_prefill_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    cu_q: list[int],
    cu_k: list[int],
    out: torch.Tensor,
) -> torch.Tensor:
    """`mla_prefill` by PyTorch's attention, a sequence at a time."""
    k = _whole_keys(k, k_rope)
    value_dim = v.shape[-1]
    if value_dim < q.shape[-1]:
        # The fused CPU kernel wants equal widths; without it the scores of all heads are held in memory.
        v = F.pad(v, (0, q.shape[-1] - value_dim))
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        if q0 == q1:
            continue
        num_queries, num_keys = q1 - q0, k1 - k0
        is_whole = num_queries == num_keys
        mask = None if is_whole or num_queries == 1 else _causal(num_queries, num_keys, q.device)
        query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (q[q0:q1], k[k0:k1], v[k0:k1]))
        is_causal = is_whole and num_queries > 1
        attended = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
        out[q0:q1] = attended[0, ..., :value_dim].transpose(0, 1)
    return out


def mla_prefill_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    cu_q: list[int],
    cu_k: list[int],
) -> torch.Tensor:
    """`mla_prefill` spelled out: all scores at once, softmax in fp32 (float64 for a float64 q)."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = _whole_keys(k, k_rope)
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1].to(compute), k[k0:k1].to(compute)) * scale
        scores.masked_fill_(~_causal(q1 - q0, k1 - k0, q.device), float("-inf"))
        out[q0:q1] = torch.einsum("hqk,khv->qhv", scores.softmax(-1), v[k0:k1].to(compute)).to(q.dtype)
    return out


def _whole_keys(k: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
    return torch.cat((k, k_rope.unsqueeze(1).expand(-1, k.shape[1], -1)), dim=-1)


def _causal(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """[Tq, Tk] bool, true where a query may look; aligned to the lower right."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(num_keys - num_queries)
