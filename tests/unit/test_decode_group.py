import torch
from hypothesis import given
from hypothesis import strategies as st

from services.engine.batch import Span
from services.engine.decode_group import decode_groups

BLOCK = 4


def make_spans(context_lens):
    tables = [torch.arange(-(-length // BLOCK)) + 100 * row for row, length in enumerate(context_lens)]
    return [Span(row, 1, length, table) for row, (length, table) in enumerate(zip(context_lens, tables, strict=True))]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_every_span_is_in_one_group_and_little_is_padded(context_lens):
    groups = decode_groups(make_spans(context_lens), BLOCK)
    assert sorted(span.start for group in groups for span in group.spans) == list(range(len(context_lens)))
    for group in groups:
        lengths = [span.context_len for span in group.spans]
        assert min(lengths) >= 0.75 * max(lengths)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_a_group_reads_the_context_of_each_span_and_masks_the_rest(context_lens):
    for group in decode_groups(make_spans(context_lens), BLOCK):
        longest = group.bias.shape[-1]
        tables = group.block_ids.view(len(group.spans), -1)
        for row, span in enumerate(group.spans):
            held = (group.bias[row, 0] == 0).nonzero().flatten()
            assert held.tolist() == list(range(span.context_len))
            assert tables[row, : len(span.block_ids)].equal(span.block_ids)
            padding = [index for index in group.padding.tolist() if index // longest == row]
            assert padding == list(range(row * longest + span.context_len, (row + 1) * longest))
