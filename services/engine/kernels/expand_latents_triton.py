# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A product whose number of rows is read on the device: as many programs as multiprocessors share out its tiles.

cuBLAS wants to know the size on the host, where a captured graph fixed it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from services.engine.kernels.multiprocessors import num_multiprocessors


@dataclass(frozen=True)
class Cut:
    """Rows, columns and channels at a time, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def cut_for(dtype: torch.dtype) -> Cut:
    """The measured best on an H100."""
    return Cut(64, 64, 32, 4, 2) if dtype == torch.float32 else Cut(256, 128, 64, 8, 3)


def expand_latents_triton(
    latents: torch.Tensor, weight: torch.Tensor, num_keys: torch.Tensor, cut: Cut | None = None
) -> torch.Tensor:
    """See `expand_latents`."""
    cut = cut or cut_for(latents.dtype)
    num_rows, num_channels = latents.shape
    num_outputs = weight.shape[0]
    out = torch.empty(num_rows, num_outputs, dtype=latents.dtype, device=latents.device)
    _expand[(num_multiprocessors(latents.device),)](
        _tiles_of(latents, cut.block_m, cut.block_k),
        _tiles_of(weight, cut.block_n, cut.block_k),
        _tiles_of(out, cut.block_m, cut.block_n),
        num_keys,
        num_outputs,
        SIZE=num_channels,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        BLOCK_K=cut.block_k,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
    )
    return out


def _tiles_of(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What lies beyond x reads as zero and is not written."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


@triton.jit
def _expand(
    latents,
    weights,
    out,
    num_keys,
    num_outputs,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_n = tl.cdiv(num_outputs, BLOCK_N)
    num_tiles = tl.cdiv(tl.load(num_keys), BLOCK_M) * num_n
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        m = tile // num_n * BLOCK_M
        n = tile % num_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, SIZE, BLOCK_K):
            a = latents.load([m, k])
            b = weights.load([n, k])
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        out.store([m, n], acc.to(out.dtype))
