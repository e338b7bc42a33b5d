"""A checksum per block, the same on CPU and GPU, about as fast as a copy.

R rows: the vectors of all slots and layers of a block. W words a row. A block's digest is two 64-bit numbers:
    d0 = sum over words of x * w(position)                        flips, swaps and shifts anywhere in the block
    d1 = sum over rows of mix(sum of the row's words) * w(row)    what d0 misses: errors in the words' top bits alone
modulo 2^64, the weights odd: one wrong word always changes d0. It guards against faults, not against forgery.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

DIGEST_BYTES = 16
# Bounds the scratch memory of a digest on the GPU, where blocks are gathered to be summed in few kernels.
_GATHER_BYTES = 64 << 20
_WORD_TYPES = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class BlockDigest:
    """Digests of the blocks of one pool [num_blocks, num_layers, block_size, width].

    The weights take as many bytes as one block.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        row_bytes = pool.shape[-1] * pool.element_size()
        word_bytes = next(size for size in _WORD_TYPES if row_bytes % size == 0)
        self._rows_NRW = pool.view(_WORD_TYPES[word_bytes]).flatten(1, 2)
        _, num_rows, num_words = self._rows_NRW.shape
        self._word_weights_RW = _weights(num_rows * num_words, pool.device).view(num_rows, num_words)
        self._row_weights_R = _weights(num_rows, pool.device)
        self._gather = max(1, _GATHER_BYTES // (8 * num_rows * num_words))

    def of(self, block_ids: Sequence[int]) -> bytes:
        """The blocks' digests in order, DIGEST_BYTES each. On a GPU it runs on, and waits for, the current stream."""
        sums = self._sums_gpu if self._rows_NRW.is_cuda else self._sums_cpu
        chunks = [block_ids[i : i + self._gather] for i in range(0, len(block_ids), self._gather)]
        digests_N2 = torch.cat([sums(chunk) for chunk in chunks])
        return digests_N2.cpu().numpy().astype("<i8", copy=False).tobytes()

    def _sums_cpu(self, block_ids: Sequence[int]) -> torch.Tensor:
        weights = self._word_weights_RW.view(-1)
        row_sums_NR = torch.empty(len(block_ids), len(self._row_weights_R), dtype=torch.int64)
        word_sums = []
        for i, block_id in enumerate(block_ids):
            # Block by block: the second sum then finds the words in the processor's cache.
            rows_RW = self._rows_NRW[block_id].to(torch.int64)
            word_sums.append(torch.dot(rows_RW.view(-1), weights))
            torch.sum(rows_RW, dim=-1, out=row_sums_NR[i])
        return torch.stack([torch.stack(word_sums), self._mixed(row_sums_NR)], dim=1)

    def _sums_gpu(self, block_ids: Sequence[int]) -> torch.Tensor:
        index = torch.tensor(block_ids, device=self._rows_NRW.device)
        rows_NRW = self._rows_NRW.index_select(0, index).to(torch.int64)
        row_sums_NR = rows_NRW.sum(-1)
        return torch.stack([rows_NRW.mul_(self._word_weights_RW).sum((1, 2)), self._mixed(row_sums_NR)], dim=1)

    def _mixed(self, row_sums_NR: torch.Tensor) -> torch.Tensor:
        mixed_NR = (row_sums_NR ^ (row_sums_NR >> 29)) * self._row_weights_R
        return (mixed_NR ^ (mixed_NR >> 32)).sum(-1)


def _weights(count: int, device: torch.device) -> torch.Tensor:
    """Odd 64-bit numbers that look random, by formula: torch's generators may change between versions.

    Multiplication wraps and >> keeps the sign, on CPU and GPU alike.
    """
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device) * -7046029254386353131
    z = (z ^ (z >> 30)) * -4658895280553007687
    z = (z ^ (z >> 27)) * -7723592293110705685
    return (z ^ (z >> 31)) | 1
