"""What attention does with its projections before it attends: rope, the latents' norm, and their way into the cache.

T tokens, H heads, N nope, R rope, C latent. Angles turn pairs of neighbours, as in `rotary.rotate`.
"""

from __future__ import annotations

import torch

from services.engine.kernels.add_rms_norm import add_rms_norm_reference
from services.engine.kernels.mla_decode import SCALE_BLOCK

SMALLEST_AMAX = 1e-4
E4M3_MAX = 448.0
# Up to here every token reads the keys' weights for itself.
FEW_TOKENS = 2


def mla_store(
    q: torch.Tensor,
    latents: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    key_weights: torch.Tensor,
    absorbed: torch.Tensor,
) -> None:
    """Ropes q, norms and ropes latents, all in place, and stores the latents in the cache.

    q [T, H, N + R], latents [T, C + R]: rows may be strided. norm_weight [C]. cos, sin: tables [positions, R / 2] fp32.
    cache: one layer's view of the pool [num_blocks, block_size, width], numbers or FP8 records. positions, slots [T]
    int32; a slot is block * block_size + offset, and a negative one is nowhere: nothing is stored.
    absorbed [B, H, C + R]: takes the first B rows of q, what is not roped times key_weights [H, N, C].
    """
    arguments = (q, latents, norm_weight, eps, positions, cos, sin, cache, slots)
    if not q.is_cuda:
        mla_store_reference(*arguments, key_weights, absorbed)
        return
    from services.engine.kernels.mla_store_triton import mla_store_triton

    absorbs = len(q) <= FEW_TOKENS and key_weights.stride(2) == 1
    mla_store_triton(*arguments, absorbed, key_weights if absorbs else None)
    if len(absorbed) and not absorbs:
        _absorb(q, key_weights, absorbed)


def mla_store_reference(
    q: torch.Tensor,
    latents: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    key_weights: torch.Tensor,
    absorbed: torch.Tensor,
) -> None:
    """`mla_store` in plain PyTorch."""
    _absorb(q, key_weights, absorbed)
    rank, rope = norm_weight.shape[0], 2 * cos.shape[1]
    angles = cos[positions.long()], sin[positions.long()]
    q[..., -rope:] = _rotate(q[..., -rope:], *(each.unsqueeze(1) for each in angles))
    absorbed[..., rank:] = q[: len(absorbed), :, -rope:]
    latents[:, :rank] = add_rms_norm_reference(latents[:, :rank], None, norm_weight, eps)
    latents[:, rank:] = _rotate(latents[:, rank:], *angles)
    kept = slots >= 0
    slots = slots[kept].long()
    rows = latents[kept]
    if not len(rows):
        return
    if cache.dtype == torch.uint8:
        rows = pack_latents(rows, rank)
    cache[slots // cache.shape[1], slots % cache.shape[1]] = rows.to(cache.dtype)


def _absorb(q: torch.Tensor, key_weights: torch.Tensor, absorbed: torch.Tensor) -> None:
    nope, rank = key_weights.shape[1:]
    rows = q[: len(absorbed), :, :nope].transpose(0, 1)
    torch.bmm(rows, key_weights, out=absorbed[..., :rank].transpose(0, 1))


def pack_latents(rows: torch.Tensor, kv_lora_rank: int) -> torch.Tensor:
    """[T, C + R] numbers to [T, bytes] of the FP8 layout (see mla_decode.py); the scale is amax / 448."""
    groups = rows[:, :kv_lora_rank].float().unflatten(-1, (-1, min(SCALE_BLOCK, kv_lora_rank)))
    scales = groups.abs().amax(-1).clamp_min(SMALLEST_AMAX)
    scales = scales / scales.new_full((), E4M3_MAX)
    quantized = (groups / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).flatten(-2)
    rope = rows[:, kv_lora_rank:].to(torch.bfloat16).contiguous()
    return torch.cat([part.view(torch.uint8) for part in (quantized, scales, rope)], dim=-1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    even, odd = x.to(compute).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
