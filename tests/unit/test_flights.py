"""Steps that overlap, on a CPU through the kernels' references: the same replies as one step after another."""

from __future__ import annotations

import random

import pytest
import torch

from services.common.errors import NumericsError
from services.common.sampling import FinishReason, SamplingParams
from services.engine.engine import EngineRequest
from services.engine.noise import stream_key, stream_key_array
from tests.unit.test_fused_runner import CONFIGS, engine_of, prompts, replies

KINDS = [
    SamplingParams(temperature=0.0, max_tokens=20),
    SamplingParams(temperature=1.0, max_tokens=9, seed=1),
    SamplingParams(temperature=0.8, top_p=0.7, max_tokens=14, seed=2, stop_token_ids=(5, 6, 7, 8, 9, 10, 11)),
    SamplingParams(temperature=1.5, top_k=7, max_tokens=30, seed=3, ignore_eos=True),
    SamplingParams(temperature=0.7, min_p=0.1, max_tokens=11, seed=4),
    SamplingParams(temperature=0.9, seed=5, max_tokens=12, frequency_penalty=0.4),
    SamplingParams(temperature=0.0, max_tokens=13, logprobs=2),
]


def run(engine, asked, kinds, *, actions=None):
    """(token ids, finish reason) by request; actions: called before each step with (engine, number of the step)."""
    tokens = {str(i): [] for i in range(len(asked))}
    reasons = dict.fromkeys(tokens)
    for i, prompt in enumerate(asked):
        engine.add(EngineRequest(str(i), prompt, kinds[i % len(kinds)]))
    num_steps = 0
    while engine.has_work:
        if actions is not None:
            actions(engine, num_steps)
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            reasons[output.request_id] = output.finish_reason
        engine.check_integrity()
        num_steps += 1
    assert engine.pool.num_free_blocks == engine.pool.num_blocks
    assert not engine.scheduler.has_open_step
    return [(tokens[i], reasons[i]) for i in tokens]


@pytest.mark.parametrize("limits", [{}, {"num_blocks": 30}, {"max_num_batched_tokens": 12}, {"max_num_sequences": 2}])
@pytest.mark.parametrize("kinds", [KINDS[:5], KINDS])
def test_replies_and_ends_are_those_of_one_step_after_another(limits, kinds):
    asked = prompts([3, 40, 9, 17, 30, 22, 5, 8])
    expected = run(engine_of(CONFIGS["v3"], is_fused=False, **limits), asked, kinds)
    assert run(engine_of(CONFIGS["v3"], is_fused=True, **limits), asked, kinds) == expected
    assert FinishReason.LENGTH in {reason for _, reason in expected}


def test_a_step_is_under_way_while_the_one_before_is_read():
    engine = engine_of(CONFIGS["v2"], is_fused=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    for i, prompt in enumerate(prompts([3, 4])):
        engine.add(EngineRequest(str(i), prompt, sampling))
    under_way = []
    while engine.has_work:
        engine.step()
        under_way.append(engine.scheduler.has_open_step)
    assert under_way == [True, True, True, True, True, False]  # that the sixth token is the last one was known


def test_a_late_end_costs_one_token_and_no_block():
    engine = engine_of(CONFIGS["v2"], is_fused=True)
    prompt = prompts([9])[0]
    (whole,) = replies(engine, [prompt])
    stops = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True, stop_token_ids=(whole[3],))
    engine.add(EngineRequest("0", prompt, stops))
    tokens = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
        engine.check_integrity()
    assert tokens == whole[: whole.index(whole[3]) + 1]
    assert engine.pool.num_free_blocks == engine.pool.num_blocks


@pytest.mark.parametrize("seed", range(6))
def test_random_arrivals_and_aborts_leak_nothing_and_change_no_token(seed):
    rng = random.Random(seed)
    asked = prompts([rng.randint(1, 40) for _ in range(10)])
    kinds = [KINDS[rng.randrange(len(KINDS))] for _ in asked]
    expected = [
        run(engine_of(CONFIGS["v2"], is_fused=False), [p], [k])[0][0] for p, k in zip(asked, kinds, strict=True)
    ]
    engine = engine_of(CONFIGS["v2"], is_fused=True, num_blocks=40)
    tokens = {str(i): [] for i in range(10)}
    aborted, waiting = set(), list(range(10))
    while engine.has_work or waiting:
        if waiting and rng.random() < 0.4:
            i = waiting.pop(0)
            engine.add(EngineRequest(str(i), asked[i], kinds[i]))
        if rng.random() < 0.1:
            aborted |= {i for i in [str(rng.randrange(10))] if engine.abort(i)}
        for output in engine.step():
            assert output.request_id not in aborted
            tokens[output.request_id] += output.token_ids
        engine.check_integrity()
    assert engine.pool.num_free_blocks == engine.pool.num_blocks
    for i, whole in enumerate(expected):
        given = tokens[str(i)]
        assert given == (whole[: len(given)] if str(i) in aborted else whole)


def test_an_id_that_is_used_again_at_once_gets_its_own_tokens():
    engine = engine_of(CONFIGS["v2"], is_fused=True)
    first, second = prompts([7, 8])
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    (expected,) = replies(engine, [second], sampling)
    engine.add(EngineRequest("0", first, sampling))
    engine.step()
    engine.abort("0")
    engine.add(EngineRequest("0", second, sampling))
    tokens = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
        engine.check_integrity()
    assert tokens == expected


def test_no_numbers_in_the_middle_of_a_reply_end_it_alone():
    asked = prompts([5, 6, 7])
    sampling = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    expected = replies(engine_of(CONFIGS["v2"], is_fused=True), asked, sampling)
    engine = engine_of(CONFIGS["v2"], is_fused=True)
    broken = next(token for token in expected[1] if all(token not in reply for reply in (expected[0], expected[2])))
    engine._runner.model.model.embed_tokens.weight.data[broken] = torch.nan
    for i, prompt in enumerate(asked):
        engine.add(EngineRequest(str(i), prompt, sampling))
    tokens, errors = {"0": [], "1": [], "2": []}, {}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.error is not None:
                errors[output.request_id] = output.error
        engine.check_integrity()
    assert isinstance(errors.pop("1"), NumericsError)
    assert not errors
    assert tokens["1"] == expected[1][: expected[1].index(broken) + 1]
    assert (tokens["0"], tokens["2"]) == (expected[0], expected[2])


def test_a_launch_that_fails_can_be_made_again():
    asked = prompts([5, 30])
    expected = replies(engine_of(CONFIGS["v2"], is_fused=True), asked)
    engine = engine_of(CONFIGS["v2"], is_fused=True)
    launch, fails_at = engine._runner.launch, iter([False, False, True, False, True] + [False] * 99)

    def failing(*arguments):
        if next(fails_at):
            raise RuntimeError("no memory")
        return launch(*arguments)

    engine._runner.launch = failing
    tokens = {"0": [], "1": []}
    num_failures = 0
    for i, prompt in enumerate(asked):
        engine.add(EngineRequest(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)))
    while engine.has_work:
        try:
            outputs = engine.step()
        except RuntimeError:
            num_failures += 1
            continue
        for output in outputs:
            tokens[output.request_id] += output.token_ids
        engine.check_integrity()
    assert num_failures == 2
    assert list(tokens.values()) == expected


def test_blocks_that_are_kept_are_not_written_to_any_more():
    engine = engine_of(CONFIGS["v2"], is_fused=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    engine.add(EngineRequest("0", prompts([7])[0], sampling, keeps_blocks=True))
    kept = ()
    while engine.has_work:
        for output in engine.step():
            kept = output.block_table
    assert not engine.scheduler.has_open_step
    engine.check_integrity([kept])
    engine.release_blocks(kept)


def test_keys_of_many_rows_are_those_of_each():
    seeds, positions = [0, 1, 2**64 - 1, 2**70 + 3, 12345], [0, 7, 100_000, 3, 2**31]
    assert stream_key_array(seeds, positions).tolist() == [
        stream_key(*pair) for pair in zip(seeds, positions, strict=True)
    ]
