"""MLA decode by FlashMLA (package `sgl-flash-mla`), where it is installed and faster: many heads on a Hopper GPU."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

# Up to here the time goes into reading the latents, and our own kernel reads them as fast.
FEW_HEADS = 32


@functools.cache
def flash_mla() -> ModuleType | None:
    """The package, if it is there, loads, and has the dense kernel for Hopper."""
    try:
        package = importlib.import_module("flash_mla")
    except (ImportError, OSError):
        return None
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    has_legacy = getattr(package, "has_legacy", None)
    return package if is_hopper and has_legacy is not None and has_legacy() else None


def is_best(q: torch.Tensor, cache: torch.Tensor, kv_lora_rank: int) -> bool:
    """Whether FlashMLA takes these inputs and is the faster one."""
    fits = cache.dtype in (torch.bfloat16, torch.float16) and cache.dtype == q.dtype
    fits = fits and kv_lora_rank == 512 and q.shape[-1] == 576 and cache.shape[1] == 64
    return fits and q.shape[1] > FEW_HEADS and flash_mla() is not None


def mla_decode_flash_mla(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    kv_lora_rank: int,
) -> torch.Tensor:
    """See `mla_decode`; for blocks of 64 tokens of 512 + 64 bfloat16 or float16 numbers."""
    package = flash_mla()
    assert package is not None
    # A new schedule each time: it is computed on the device from the lengths, so that a graph's replay follows them.
    schedule, _ = package.get_mla_metadata()
    out: torch.Tensor = package.flash_mla_with_kvcache(
        q.unsqueeze(1),
        cache.unsqueeze(2),
        block_tables,
        context_lens,
        kv_lora_rank,
        schedule,
        softmax_scale=scale,
        is_fp8_kvcache=False,
        use_legacy=True,
    )[0]
    return out.squeeze(1).masked_fill_((context_lens == 0)[:, None, None], 0)
