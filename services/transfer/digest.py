"""A checksum per block, the same on CPU and GPU, about as fast as a copy.

R rows: the vectors of all slots and layers of a block. W words of 64 bits a row. A block's digest is two numbers:
    row hash = sum over words of x * w(word)
    d0 = sum over rows of row hash * w(row)         any single wrong word changes it, since all weights are odd
    d1 = sum over rows of mix(row hash) * w(row)    not linear: errors in several rows do not cancel
modulo 2^64. It guards against faults, not against forgery.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

DIGEST_BYTES = 16
# Bounds the scratch memory of a digest on the GPU, where blocks are gathered to be summed in few kernels.
_GATHER_BYTES = 64 << 20
_WORD_TYPES = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class BlockDigest:
    """Digests of the blocks of one pool [num_blocks, num_layers, block_size, width]."""

    def __init__(self, pool: torch.Tensor) -> None:
        row_bytes = pool.shape[-1] * pool.element_size()
        word_bytes = next(size for size in _WORD_TYPES if row_bytes % size == 0)
        self._rows_NRW = pool.view(_WORD_TYPES[word_bytes]).flatten(1, 2)
        _, num_rows, num_words = self._rows_NRW.shape
        weights = _weights(num_words + num_rows, pool.device)
        self._word_weights_W, self._row_weights_R = weights[:num_words], weights[num_words:]
        self._gather = max(1, _GATHER_BYTES // (8 * num_rows * num_words))

    def of(self, block_ids: Sequence[int]) -> bytes:
        """The blocks' digests in order, DIGEST_BYTES each. On a GPU it runs on, and waits for, the current stream."""
        row_hashes = self._row_hashes_gpu if self._rows_NRW.is_cuda else self._row_hashes_cpu
        digests = []
        for start in range(0, len(block_ids), self._gather):
            hashes_NR = row_hashes(block_ids[start : start + self._gather])
            mixed_NR = (hashes_NR ^ (hashes_NR >> 29)) * -4658895280553007687
            sums = [(values_NR * self._row_weights_R).sum(-1) for values_NR in (hashes_NR, mixed_NR ^ (mixed_NR >> 32))]
            digests.append(torch.stack(sums, dim=1))
        return torch.cat(digests).cpu().numpy().astype("<i8", copy=False).tobytes()

    def _row_hashes_cpu(self, block_ids: Sequence[int]) -> torch.Tensor:
        # Block by block, which copies nothing.
        return torch.stack([torch.mv(self._rows_NRW[i].to(torch.int64), self._word_weights_W) for i in block_ids])

    def _row_hashes_gpu(self, block_ids: Sequence[int]) -> torch.Tensor:
        # CUDA has no matrix product of integers; gathered, many blocks take three kernels.
        rows_NRW = self._rows_NRW.index_select(0, torch.tensor(block_ids, device=self._rows_NRW.device))
        return rows_NRW.to(torch.int64).mul_(self._word_weights_W).sum(-1)


def _weights(count: int, device: torch.device) -> torch.Tensor:
    """Odd 64-bit numbers that look random, by formula: torch's generators may change between versions.

    Multiplication wraps and >> keeps the sign, on CPU and GPU alike.
    """
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device) * -7046029254386353131
    z = (z ^ (z >> 30)) * -4658895280553007687
    z = (z ^ (z >> 27)) * -7723592293110705685
    return (z ^ (z >> 31)) | 1
