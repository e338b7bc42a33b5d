"""The block tables of running sequences, kept on the device: a step only sends what was added since the last one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.engine.sequence import Sequence


@dataclass(slots=True)
class _Row:
    """One sequence's row. table: the list that was sent; another list means that the sequence began anew."""

    index: int
    table: list[int]
    num_sent: int


class DeviceTables:
    """A table [1 + max_rows, max_blocks] int32 on the device. Row 0 belongs to nobody: padding names it.

    Rows stay with their sequences until others need them.
    """

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        self.tensor = torch.zeros(1 + max_rows, max_blocks, dtype=torch.int32, device=device)
        self._rows: OrderedDict[Sequence, _Row] = OrderedDict()  # by last use
        self._free = list(range(max_rows, 0, -1))

    def rows_of(self, sequences: Iterable[Sequence]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Their rows [B] int32, and what has to be written first: flat places [n] int64, block ids [n] int32.

        No more sequences at once than there are rows.
        """
        indices: list[int] = []
        places: list[int] = []
        ids: list[int] = []
        width = self.tensor.shape[1]
        used = [(seq, self._row(seq)) for seq in sequences]
        for seq, row in used:
            table = seq.block_table
            if row.table is not table:
                row.table, row.num_sent = table, 0
            if row.num_sent < len(table):
                start = row.index * width
                places += range(start + row.num_sent, start + len(table))
                ids += table[row.num_sent :]
                row.num_sent = len(table)
            indices.append(row.index)
        return np.array(indices, np.int32), np.array(places, np.int64), np.array(ids, np.int32)

    def write(self, places: Tensor, ids: Tensor) -> None:
        """Writes block ids at flat places, both on the device."""
        self.tensor.view(-1).index_copy_(0, places, ids)

    def _row(self, seq: Sequence) -> _Row:
        row = self._rows.get(seq)
        if row is None:
            if not self._free:
                _, oldest = self._rows.popitem(last=False)
                self._free.append(oldest.index)
            row = self._rows[seq] = _Row(self._free.pop(), seq.block_table, 0)
        self._rows.move_to_end(seq)
        return row
