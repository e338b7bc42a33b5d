"""The sampler against transformers' logits processors, against arithmetic by hand, and against its own promises."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from services.common.errors import InvalidRequest, NumericsError
from services.common.sampling import SamplingParams
from services.engine.kernels.draw_tokens import NUM_CANDIDATES
from services.engine.noise import gumbel, stream_key, stream_key_array
from services.engine.sampler import (
    Sampler,
    SamplingRow,
    check_vocabulary,
    prompt_logprobs,
    resolve_seed,
)

GREEDY = SamplingParams(temperature=0.0)


def make_row(params: SamplingParams, prompt=(), output=(), seed: int = 0, position: int | None = None) -> SamplingRow:
    return SamplingRow(params, list(prompt), list(output), len(output) if position is None else position, seed)


def sample_many(logits_V: torch.Tensor, params: SamplingParams, num_draws: int) -> Counter[int]:
    rows = [make_row(params, seed=seed, position=seed % 7) for seed in range(num_draws)]
    return Counter(s.token_id for s in Sampler().sample(logits_V.expand(num_draws, -1), rows))


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def assert_follows(counts: Counter[int], probabilities: torch.Tensor) -> None:
    """Only allowed tokens, and Pearson's statistic within five standard deviations of its mean."""
    num_draws = sum(counts.values())
    assert all(probabilities[token] > 0 for token in counts)
    cells = [(counts[i], float(p) * num_draws) for i, p in enumerate(probabilities) if p * num_draws >= 5]
    rest = num_draws - sum(observed for observed, _ in cells), num_draws - sum(expected for _, expected in cells)
    cells += [rest] if rest[1] >= 5 else []
    chi_square = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    freedom = max(len(cells) - 1, 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


def hf_probabilities(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    scores = logits_V.float().unsqueeze(0)
    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = hf.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.min_p:
        scores = hf.MinPLogitsWarper(params.min_p)(ids, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = hf.TopPLogitsWarper(params.top_p)(ids, scores)
    return scores.softmax(-1).squeeze(0)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.5),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=0.8, top_k=12, top_p=0.8),
        SamplingParams(temperature=1.5, top_k=20, top_p=0.95, min_p=0.02),
        SamplingParams(top_k=10_000, top_p=0.999),
    ],
)
def test_draws_follow_the_distribution_of_transformers(params: SamplingParams) -> None:
    logits = random_logits(1, 40)[0]
    assert_follows(sample_many(logits, params, 6000), hf_probabilities(logits, params))


@pytest.mark.parametrize(("scale", "top_k", "top_p"), [(0.1, 0, 0.6), (0.1, 0, 0.05), (4.0, 0, 0.9), (0.5, 256, 0.5)])
def test_nucleus_of_a_large_vocabulary_is_that_of_transformers(scale: float, top_k: int, top_p: float) -> None:
    # 0.1: the nucleus is wider than the candidates, so the whole row is sorted.
    logits = random_logits(1, 8 * NUM_CANDIDATES, scale=scale)[0]
    params = SamplingParams(top_k=top_k, top_p=top_p)
    assert_follows(sample_many(logits, params, 2000), hf_probabilities(logits, params))


def test_top_k_one_and_tiny_top_p_are_greedy() -> None:
    logits = random_logits(1, 1000)[0]
    best = int(logits.argmax())
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=1e-6), SamplingParams(temperature=1e-30)):
        assert sample_many(logits, params, 50) == {best: 50}


def test_min_p_one_keeps_only_the_best() -> None:
    assert sample_many(torch.tensor([1.0, 3.0, 2.999]), SamplingParams(min_p=1.0), 50) == {1: 50}


def test_truncation_breaks_ties_by_lower_token_id() -> None:
    tied = torch.zeros(4 * NUM_CANDIDATES)
    assert set(sample_many(tied, SamplingParams(top_k=3), 200)) == {0, 1, 2}
    assert set(sample_many(tied, SamplingParams(top_p=2.5 / len(tied)), 200)) == {0, 1, 2}


def test_greedy_takes_the_lowest_of_tied_tokens() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.bfloat16)
    assert [s.token_id for s in Sampler().sample(logits, [make_row(GREEDY)] * 2)] == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_float_type_is_sampled_and_left_unchanged(dtype: torch.dtype) -> None:
    logits = random_logits(3, 50).to(dtype)
    before = logits.clone()
    rows = [
        make_row(GREEDY),
        make_row(SamplingParams(logit_bias={7: 100.0}, temperature=0.0, repetition_penalty=1.3), [1, 2], [3]),
        make_row(SamplingParams(top_p=0.5, logprobs=2)),
    ]
    sampled = Sampler().sample(logits, rows)
    assert sampled[0].token_id == int(logits[0].argmax())
    assert sampled[1].token_id == 7
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab_size", [30, 3000])
def test_a_row_samples_the_same_alone_and_in_any_batch(vocab_size: int) -> None:
    kinds = [
        GREEDY,
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(top_k=4, logprobs=3),
        SamplingParams(temperature=3.0, top_p=0.99, presence_penalty=1.0),
        SamplingParams(min_p=0.05, logit_bias={3: 2.0}, repetition_penalty=1.2),
    ]
    rows = [make_row(kinds[i % 6], [1, 2, i], [4, i][: i % 3], seed=i * 77) for i in range(24)]
    logits = random_logits(24, vocab_size)
    alone = [Sampler().sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    order = list(reversed(range(24)))
    together = Sampler().sample(logits[order], [rows[i] for i in order])
    assert [s.token_id for s in together] == [alone[i].token_id for i in order]


def test_same_seed_and_position_repeat_and_others_differ() -> None:
    logits = torch.zeros(1, 5000)

    def draw(seed: int, position: int) -> int:
        return Sampler().sample(logits, [make_row(SamplingParams(), seed=seed, position=position)])[0].token_id

    assert draw(5, 9) == draw(5, 9)
    assert len({draw(5, position) for position in range(20)}) > 15
    assert len({draw(seed, 0) for seed in [0, 1, 2, 2**32, 2**63, 2**64 - 1]}) == 6


def test_noise_is_pinned_so_that_seeds_survive_releases() -> None:
    # The first two outputs of splitmix64 seeded with 0, as published with the generator.
    assert [stream_key(0, position) % 2**64 for position in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert stream_key(42, 7) == 5152897204343404489
    noise = gumbel(torch.from_numpy(stream_key_array([42], [7])), torch.arange(3))
    assert noise.tolist() == pytest.approx([0.8114343651844833, -0.715471954673673, 0.21237508535009977], rel=1e-12)


def test_noise_is_standard_gumbel() -> None:
    keys = torch.from_numpy(stream_key_array(range(50), [0] * 50))
    noise = gumbel(keys.unsqueeze(-1), torch.arange(2000))
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.05)
    flat = noise.flatten()
    assert abs(float(torch.corrcoef(torch.stack([flat[1:], flat[:-1]]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(noise[:2])[0, 1])) < 0.1


def test_bad_rows_fail_alone() -> None:
    logits = random_logits(8, 20)
    logits[1, 3] = math.nan
    logits[3] = -math.inf
    logits[5, 0] = math.inf
    logits[6, :19] = -math.inf
    kinds = [GREEDY, SamplingParams(top_p=0.9, logprobs=1)]
    for shift in (0, 1):
        rows = [make_row(kinds[(i + shift) % 2], seed=i) for i in range(8)]
        sampled = Sampler().sample(logits, rows)
        assert [s.token_id < 0 for s in sampled] == [False, True, False, True, False, True, False, False]
        for s in sampled:
            assert isinstance(s.error, NumericsError) == (s.token_id < 0)
            assert s.logprobs is None or s.token_id >= 0
        assert sampled[6].token_id == 19
        fine = Sampler().sample(logits[[0, 2]], [rows[0], rows[2]])
        assert [fine[0].token_id, fine[1].token_id] == [sampled[0].token_id, sampled[2].token_id]


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[4.0, -1.0, 3.0, 2.0, 3.9]])
    # repetition 2: prompt 0 -> 2, output 1 -> -2, output 2 -> 1.5; frequency 0.5: 1 once, 2 twice; presence 1
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=1.0,
        logit_bias={3: 1.89},
        logprobs=5,
    )
    sampled = Sampler().sample(logits, [make_row(params, [0, 0], [1, 2, 2])])[0]
    assert sampled.token_id == 4
    assert sampled.logprobs is not None
    assert dict(sampled.logprobs.top) == pytest.approx(dict(enumerate(logits[0].log_softmax(-1).tolist())))
    biased = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias={3: 1.91})
    assert Sampler().sample(logits, [make_row(biased, [0, 0], [1, 2, 2])])[0].token_id == 3


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(1, 12)
    seen = [3, 4, 3, 9]
    scores = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits.clone())
    params = SamplingParams(repetition_penalty=penalty)
    rows = [make_row(params, seen[:2], seen[2:], seed=seed) for seed in range(4000)]
    counts = Counter(s.token_id for s in Sampler().sample(logits.expand(4000, -1), rows))
    assert_follows(counts, scores.softmax(-1)[0])


def test_presence_counts_once_and_frequency_counts_each() -> None:
    logits = torch.tensor([[3.0, 1.5, 0.0]])
    presence = SamplingParams(temperature=0.0, presence_penalty=1.0)
    frequency = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    assert Sampler().sample(logits, [make_row(presence, [], [0, 0])])[0].token_id == 0
    assert Sampler().sample(logits, [make_row(frequency, [], [0, 0])])[0].token_id == 1
    assert Sampler().sample(logits, [make_row(frequency, [0, 0], [])])[0].token_id == 0


def test_extreme_penalty_never_makes_an_error() -> None:
    logits = torch.tensor([[90.0, -90.0, 1.0, -math.inf]])
    params = SamplingParams(repetition_penalty=1e-38, top_p=0.9)
    assert Sampler().sample(logits, [make_row(params, [0, 1, 2, 3])])[0].token_id in (0, 2)


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = random_logits(3, 30)
    kinds = [
        SamplingParams(temperature=0.3, top_k=2, logprobs=4, logit_bias={1: 50.0}),
        SamplingParams(logprobs=0),
        SamplingParams(temperature=0.0),
    ]
    first, second, third = Sampler().sample(logits, [make_row(p) for p in kinds])
    expected = logits.log_softmax(-1)
    assert first.logprobs is not None
    assert second.logprobs is not None
    assert third.logprobs is None
    assert first.token_id == first.logprobs.token_id == 1
    assert first.logprobs.logprob == pytest.approx(float(expected[0, 1]))
    assert [token for token, _ in first.logprobs.top] == expected[0].topk(4).indices.tolist()
    assert second.logprobs.top == ()
    assert second.logprobs.logprob == pytest.approx(float(expected[1, second.token_id]))


def test_logprobs_asked_for_more_tokens_than_there_are_gives_all() -> None:
    sampled = Sampler().sample(torch.tensor([[0.0, 1.0]]), [make_row(SamplingParams(logprobs=20))])[0]
    assert sampled.logprobs is not None
    assert [token for token, _ in sampled.logprobs.top] == [1, 0]


def test_prompt_logprobs_are_log_softmax_in_every_chunk() -> None:
    logits = random_logits(300, 17).bfloat16()
    ids = [t % 17 for t in range(300)]
    result = prompt_logprobs(logits, ids, 3)
    expected = logits.float().log_softmax(-1)
    assert [r.token_id for r in result] == ids
    assert [r.logprob for r in result] == pytest.approx([float(expected[t, i]) for t, i in enumerate(ids)])
    values = expected.topk(3).values.tolist()
    assert [[v for _, v in r.top] for r in result] == [pytest.approx(row) for row in values]
    assert prompt_logprobs(logits[:0], [], 3) == []


def test_prompt_logprobs_refuse_nan() -> None:
    logits = random_logits(4, 5)
    logits[2, 2] = math.nan
    with pytest.raises(NumericsError):
        prompt_logprobs(logits, [0, 1, 2, 3], 0)


def test_token_ids_outside_of_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.logit_bias: token id 9 "):
        check_vocabulary(SamplingParams(logit_bias={9: 1.0}), 9)
    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        check_vocabulary(SamplingParams(stop_token_ids=(0, 12)), 9)
    check_vocabulary(SamplingParams(stop_token_ids=(8,), logit_bias={0: 1.0}), 9)
    with pytest.raises(InvalidRequest):
        Sampler().sample(torch.zeros(1, 4), [make_row(SamplingParams(logit_bias={4: 1.0}))])


def test_unseeded_requests_get_different_seeds() -> None:
    assert resolve_seed(SamplingParams(seed=3)) == 3
    assert resolve_seed(SamplingParams()) != resolve_seed(SamplingParams())


def test_empty_batch_gives_nothing() -> None:
    assert Sampler().sample(torch.empty(0, 5), []) == []


params_strategy = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(0.0), st.floats(0, 100, allow_subnormal=True)),
    top_k=st.integers(0, 700),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 2), st.floats(-100, 100), max_size=3),
    logprobs=st.one_of(st.none(), st.integers(0, 5)),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(params_strategy, min_size=1, max_size=4),
    st.sampled_from([3, 300, 600]),
    st.floats(0, 200),
    st.integers(0, 1000),
)
def test_any_parameters_give_an_unmasked_token(kinds, vocab_size: int, scale: float, seed: int) -> None:
    logits = random_logits(len(kinds), vocab_size, seed, scale)
    logits[:, vocab_size // 2] = -math.inf
    rows = [make_row(p, [0, 2], [2, 2], seed=seed) for p in kinds]
    for params, sampled in zip(kinds, Sampler().sample(logits, rows), strict=True):
        assert sampled.error is None
        assert 0 <= sampled.token_id < vocab_size
        assert sampled.token_id != vocab_size // 2
        assert (sampled.logprobs is None) == (params.logprobs is None)
