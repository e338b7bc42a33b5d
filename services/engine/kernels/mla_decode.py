"""One new token of each sequence attends to its cached latents, in the absorbed form of MLA.

B sequences, H heads, C = kv_lora_rank, R rope. All heads share one key of C + R numbers a token; its first C are the
value.

The FP8 layout of a token: C e4m3 numbers, ceil(C / 128) fp32 scales (multipliers of 128 numbers each), R bfloat16 rope
numbers: 656 bytes at 512 + 64.
"""

from __future__ import annotations

import torch

from services.engine.kernels import mla_decode_flash_mla

SCALE_BLOCK = 128
# Up to here every row reads the weights of its values for itself.
FEW_ROWS = 2


def unpack_latents(records: torch.Tensor, kv_lora_rank: int) -> torch.Tensor:
    """[..., bytes] uint8 records of the FP8 layout to [..., C + R] fp32."""
    records = records.contiguous()
    end = kv_lora_rank + 4 * _num_scales(kv_lora_rank)
    scales = records[..., kv_lora_rank:end].contiguous().view(torch.float32)
    scales = scales.repeat_interleave(SCALE_BLOCK, dim=-1)[..., :kv_lora_rank]
    latents = records[..., :kv_lora_rank].contiguous().view(torch.float8_e4m3fn).float() * scales
    return torch.cat((latents, records[..., end:].contiguous().view(torch.bfloat16).float()), dim=-1)


def mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    kv_lora_rank: int,
    max_context_len: int | None = None,
) -> torch.Tensor:
    """Attention of q [B, H, C + R] over the cached tokens, as [B, H, C] in q's dtype.

    `cache` is [num_blocks, block_size, width], one layer's view of the pool: numbers of width C + R, or uint8 records
    of the FP8 layout. `block_tables` is [B, max_blocks] int32; entries beyond a sequence's length are never followed.
    `context_lens` is [B] int32 and counts the new token; a row of length 0 (padding) yields zeros.
    `max_context_len` is an upper bound of the lengths: with it, little work is given to few programs of a GPU.
    On CUDA nothing is read back to the host, so the call can be captured in a graph.
    """
    if q.is_cuda and mla_decode_flash_mla.is_best(q, cache, kv_lora_rank):
        return mla_decode_flash_mla.mla_decode_flash_mla(q, cache, block_tables, context_lens, scale, kv_lora_rank)
    if q.is_cuda:
        from services.engine.kernels.mla_decode_triton import mla_decode_triton

        return mla_decode_triton(q, cache, block_tables, context_lens, scale, kv_lora_rank, max_context_len)
    return mla_decode_reference(q, cache, block_tables, context_lens, scale, kv_lora_rank)


def mla_decode_to_values(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    value_weights: torch.Tensor,
    out: torch.Tensor,
    max_context_len: int | None = None,
) -> None:
    """`mla_decode`, and each head's latents times its value_weights [H, C, V], into out [B, H, V]."""
    rank = value_weights.shape[1]
    takes_few = len(q) <= FEW_ROWS and value_weights.stride(1) == 1 and out.is_contiguous()
    if q.is_cuda and takes_few and not mla_decode_flash_mla.is_best(q, cache, rank):
        from services.engine.kernels.mla_decode_triton import mla_decode_to_values_triton

        mla_decode_to_values_triton(q, cache, block_tables, context_lens, scale, value_weights, out, max_context_len)
        return
    latents = mla_decode(q, cache, block_tables, context_lens, scale, rank, max_context_len)
    torch.bmm(latents.transpose(0, 1), value_weights, out=out.transpose(0, 1))


def mla_decode_reference(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    kv_lora_rank: int,
) -> torch.Tensor:
    """`mla_decode` in plain PyTorch: fp32 (float64 for a float64 q), one sequence after another."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    block_size = cache.shape[1]
    out = q.new_zeros(*q.shape[:2], kv_lora_rank)
    for row, length in enumerate(context_lens.tolist()):
        if length == 0:
            continue
        blocks = block_tables[row, : -(-length // block_size)]
        latents = cache.index_select(0, blocks).flatten(0, 1)[:length]
        if latents.dtype == torch.uint8:
            latents = unpack_latents(latents, kv_lora_rank)
        latents = latents.to(compute)
        weights = (q[row].to(compute) @ latents.t()).mul_(scale).softmax(-1)
        out[row] = weights @ latents[:, :kv_lora_rank]
    return out


def _num_scales(kv_lora_rank: int) -> int:
    return -(-kv_lora_rank // SCALE_BLOCK)
