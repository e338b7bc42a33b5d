"""One-token spans with contexts of about the same length, padded to the longest: one product instead of one each.

Shapes: B spans, S context rows of the longest in whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from services.engine.batch import Span

_MIN_FILL = 0.75  # a context shorter than this part of its group's longest begins the next group
_MAX_ROWS = 1100  # of one group: what is gathered should still be in the CPU's cache when it is multiplied


@dataclass(frozen=True, slots=True, eq=False)
class DecodeGroup:
    """spans: B of them, longest first. block_ids: int64 [B x blocks of the longest], padded with any block.

    bias: fp32 [B, 1, S], 0 for the context and -inf for padding. padding: int64, the rows of B x S that are padding.
    """

    spans: tuple[Span, ...]
    block_ids: Tensor
    bias: Tensor
    padding: Tensor

    @classmethod
    def of(cls, spans: ListLike[Span], block_size: int) -> DecodeGroup:
        """One group of all these spans."""
        tables = pad_sequence([span.block_ids for span in spans], batch_first=True)
        context_lens = torch.tensor([span.context_len for span in spans], device=tables.device)
        positions = torch.arange(tables.shape[1] * block_size, device=tables.device)
        is_padding = positions >= context_lens.unsqueeze(1)
        bias = torch.zeros(is_padding.shape, device=tables.device).masked_fill_(is_padding, float("-inf"))
        return cls(tuple(spans), tables.flatten(), bias.unsqueeze(1), is_padding.flatten().nonzero().squeeze(1))


def decode_groups(spans: ListLike[Span], block_size: int) -> list[DecodeGroup]:
    """Groups of one-token spans, so that little is padded."""
    by_length = sorted(spans, key=lambda span: -span.context_len)
    borders = [*_borders(by_length), len(by_length)]
    return [DecodeGroup.of(by_length[start:end], block_size) for start, end in pairwise(borders)]


def _borders(by_length: ListLike[Span]) -> Iterator[int]:
    """Where each group begins."""
    first = 0
    for index, span in enumerate(by_length):
        longest = by_length[first].context_len
        is_too_short = span.context_len < _MIN_FILL * longest
        if index == 0 or is_too_short or (index - first + 1) * longest > _MAX_ROWS:
            first = index
            yield index
