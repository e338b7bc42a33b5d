import pytest

from services.common.prefix_hash import PrefixHasher
from services.common.sampling import FinishReason, SamplingParams
from services.engine.sequence import Sequence, SequenceStatus

HASHER = PrefixHasher(b"model", 4)
EOS = 2


def make(prompt=(5, 6, 7), *, max_seq_len=100, **sampling):
    return Sequence("a", prompt, SamplingParams(**sampling), HASHER, eos_token_ids=[EOS], max_seq_len=max_seq_len)


def test_counts_prompt_generated_and_uncomputed_tokens():
    seq = make()
    seq.append(8)
    seq.append(9)
    seq.num_computed_tokens = 4
    assert (seq.num_tokens, seq.num_prompt_tokens, seq.num_generated_tokens, seq.num_uncomputed_tokens) == (5, 3, 2, 1)
    assert seq.generated_token_ids == [8, 9]
    assert seq.status is SequenceStatus.WAITING
    assert not seq.is_finished


def test_does_not_share_the_callers_list():
    prompt = [5, 6]
    seq = make(prompt)
    seq.append(7)
    assert prompt == [5, 6]


def test_hashes_follow_the_tokens():
    seq = make([1, 2, 3, 4, 5])
    for token_id in range(10):
        seq.append(token_id)
        assert seq.block_hashes == HASHER.hashes(seq.token_ids)


def test_prompt_logprobs_need_every_token_computed():
    assert make().reuses_prefix
    assert not make(prompt_logprobs=0).reuses_prefix


@pytest.mark.parametrize(
    ("sampling", "token_id", "expected"),
    [
        ({}, 8, None),
        ({}, EOS, FinishReason.STOP),
        ({"ignore_eos": True}, EOS, None),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, EOS, FinishReason.STOP),
        ({"stop_token_ids": (8, 9)}, 9, FinishReason.STOP),
        ({"max_tokens": 3}, 8, FinishReason.LENGTH),
        ({"max_tokens": 4}, 8, None),
        ({"max_tokens": 3}, EOS, FinishReason.STOP),
    ],
)
def test_third_generated_token_finishes_as_asked(sampling, token_id, expected):
    seq = make(**sampling)
    seq.append(10)
    seq.append(11)
    assert seq.finish_reason_after(token_id) is expected
    assert seq.generated_token_ids == [10, 11]


def test_finishes_when_the_context_is_full():
    seq = make([1, 2, 3], max_seq_len=5)
    assert seq.finish_reason_after(8) is None
    seq.append(8)
    assert seq.finish_reason_after(8) is FinishReason.LENGTH
