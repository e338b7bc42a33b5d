import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import InvalidRequest, InvalidSettings, NumericsError, PromptTooLong, QueueFull
from services.common.sampling import FinishReason, SamplingParams
from services.common.settings import EngineSettings, ModelSettings
from services.engine.engine import EngineRequest
from services.engine.loading import load_engine
from tests.unit.tiny_model import EOS, VOCABULARY, tiny_engine, v2_config, v3_config, write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPT = list(range(3, 17))
POISON = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A V3 checkpoint of random weights."""
    path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(path, v3_config())
    return path


@pytest.fixture
def engine(folder):
    return tiny_engine(folder)


def drain(engine):
    """All outputs until nothing is left to do, by request."""
    outputs = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    return outputs


def tokens_of(outputs):
    return [token for output in outputs for token in output.token_ids]


def reply(engine, prompt=PROMPT, sampling=GREEDY, **fields):
    engine.add(EngineRequest("r", prompt, sampling, **fields))
    return tokens_of(drain(engine)["r"])


def assert_all_free(engine):
    engine.check_integrity()
    assert not engine.has_work
    assert engine.pool.num_free_blocks == engine.pool.num_blocks


# Requests that are refused.


@pytest.mark.parametrize("prompt", [[], [-1], [VOCABULARY], [3, VOCABULARY + 5, 4], [2**70]])
def test_a_prompt_of_no_or_unknown_tokens_is_refused(engine, prompt):
    with pytest.raises(InvalidRequest) as caught:
        engine.add(EngineRequest("r", prompt, GREEDY))
    assert caught.value.field == "prompt"
    assert_all_free(engine)


@pytest.mark.parametrize("resumed", [[-1], [VOCABULARY]])
def test_a_resumed_reply_of_unknown_tokens_is_refused(engine, resumed):
    with pytest.raises(InvalidRequest):
        engine.add(EngineRequest("r", PROMPT, GREEDY, resumed_token_ids=resumed))
    assert_all_free(engine)


@pytest.mark.parametrize("length", [256, 257, 1000])
def test_a_prompt_that_leaves_no_room_for_a_reply_is_refused(folder, length):
    engine = tiny_engine(folder, num_blocks=300)
    with pytest.raises(PromptTooLong):
        engine.add(EngineRequest("r", [5] * length, GREEDY))
    assert_all_free(engine)
    assert len(reply(engine, [5] * 255)) == 1


def test_a_prompt_that_the_cache_cannot_hold_is_refused(folder):
    engine = tiny_engine(folder, num_blocks=4)
    with pytest.raises(InvalidRequest):
        engine.add(EngineRequest("r", [5] * 17, GREEDY))
    assert_all_free(engine)
    assert len(reply(engine, [5] * 16)) == 1


@pytest.mark.parametrize("sampling", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}])
def test_sampling_parameters_out_of_range_are_refused_by_name(sampling):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**sampling)
    assert caught.value.field == f"sampling.{next(iter(sampling))}"


@pytest.mark.parametrize("sampling", [{"logit_bias": {VOCABULARY: 1.0}}, {"stop_token_ids": (VOCABULARY,)}])
def test_sampling_tokens_outside_of_the_vocabulary_are_refused(engine, sampling):
    with pytest.raises(InvalidRequest):
        engine.add(EngineRequest("r", PROMPT, SamplingParams(**sampling)))
    assert_all_free(engine)


def test_a_full_queue_refuses_one_more(folder):
    engine = tiny_engine(folder, max_num_waiting=2)
    for name in "ab":
        engine.add(EngineRequest(name, PROMPT, GREEDY))
    with pytest.raises(QueueFull):
        engine.add(EngineRequest("c", PROMPT, GREEDY))
    assert drain(engine).keys() == {"a", "b"}
    assert_all_free(engine)


def test_a_request_id_in_use_is_refused_and_the_first_goes_on(engine):
    wanted = reply(engine)
    engine.add(EngineRequest("r", PROMPT, GREEDY))
    with pytest.raises(ValueError, match="scheduled already"):
        engine.add(EngineRequest("r", [9], GREEDY))
    assert tokens_of(drain(engine)["r"]) == wanted


def test_a_cache_of_no_block_is_refused(folder):
    with pytest.raises(InvalidSettings, match="kv_cache_bytes"):
        load_engine(ModelSettings(path=str(folder)), EngineSettings(device="cpu", kv_cache_bytes=10))


def test_a_missing_gpu_is_refused(folder):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InvalidSettings, match="CUDA"):
        load_engine(ModelSettings(path=str(folder)), EngineSettings(device="cuda"))


# How replies end.


def test_ends_at_max_tokens(engine):
    engine.add(EngineRequest("r", PROMPT, GREEDY))
    outputs = drain(engine)["r"]
    assert len(tokens_of(outputs)) == 12
    assert [output.finish_reason for output in outputs] == [None] * 11 + [FinishReason.LENGTH]
    assert_all_free(engine)


def test_ends_at_the_end_token_unless_told_otherwise(engine):
    always_eos = {"temperature": 0.0, "max_tokens": 5, "logit_bias": {EOS: 100.0}}
    engine.add(EngineRequest("stops", PROMPT, SamplingParams(**always_eos)))
    engine.add(EngineRequest("goes on", PROMPT, SamplingParams(**always_eos, ignore_eos=True)))
    outputs = drain(engine)
    assert tokens_of(outputs["stops"]) == [EOS]
    assert outputs["stops"][-1].finish_reason is FinishReason.STOP
    assert tokens_of(outputs["goes on"]) == [EOS] * 5


def test_ends_at_a_stop_token(engine):
    tokens = reply(engine)
    stop = next(token for token in tokens[1:] if token != tokens[0])
    sampling = dataclasses.replace(GREEDY, stop_token_ids=(stop,))
    engine.add(EngineRequest("r", PROMPT, sampling))
    outputs = drain(engine)["r"]
    assert tokens_of(outputs) == tokens[: tokens.index(stop) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_ends_where_the_context_is_full(engine):
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    assert len(reply(engine, [5] * 250, sampling)) == 6
    assert_all_free(engine)


def test_a_reason_found_outside_ends_the_reply(engine):
    engine.add(EngineRequest("r", PROMPT, GREEDY))
    engine.step()
    assert engine.finish("r", FinishReason.STOP)
    assert not engine.finish("r", FinishReason.STOP)
    assert_all_free(engine)


# Aborts.


@pytest.mark.parametrize("num_steps", range(10))
@pytest.mark.parametrize("chunk", [3, 64])
def test_an_abort_at_any_point_frees_everything_and_disturbs_nobody(folder, chunk, num_steps):
    engine = tiny_engine(folder, max_num_batched_tokens=chunk, max_num_sequences=2, prefix_caching=False)
    wanted = reply(engine, [7, 8, 9, 10])
    engine.add(EngineRequest("victim", PROMPT, GREEDY))
    engine.add(EngineRequest("other", [7, 8, 9, 10], GREEDY))
    engine.add(EngineRequest("waits", PROMPT, GREEDY))
    outputs = []
    for _ in range(num_steps):
        outputs += engine.step()
    assert engine.abort("victim")
    assert engine.abort("waits")
    assert not engine.abort("victim")
    assert not engine.abort("unknown")
    engine.check_integrity()
    outputs += drain(engine).get("other", [])
    assert tokens_of(output for output in outputs if output.request_id == "other") == wanted
    assert_all_free(engine)


@given(st.lists(st.tuples(st.sampled_from(["add", "step", "abort"]), st.integers(0, 5)), max_size=40))
@settings(max_examples=20, deadline=None)
def test_random_adds_steps_and_aborts_leak_nothing_and_change_no_token(folder, actions):
    engine = tiny_engine(folder, num_blocks=14, max_num_batched_tokens=6, max_num_sequences=3)
    prompts = [PROMPT[: 3 + 2 * i] for i in range(6)]
    live, replies = {}, {}

    def step():
        for output in engine.step():
            replies[output.request_id] += output.token_ids

    for number, (action, i) in enumerate(actions):
        if action == "add":
            name = f"{number}"
            live[name], replies[name] = i, []
            engine.add(EngineRequest(name, prompts[i], GREEDY))
        elif action == "step":
            step()
        elif live:
            name = list(live)[i % len(live)]
            del live[name]
            engine.abort(name)
        engine.check_integrity()
    while engine.has_work:
        step()
    assert_all_free(engine)
    alone = tiny_engine(folder, prefix_caching=False)
    wanted = {i: reply(alone, prompts[i]) for i in set(live.values())}
    assert {name: replies[name] for name in live} == {name: wanted[i] for name, i in live.items()}


# NaN in one sequence.


def poisoned(folder, token_id, **changes):
    """An engine that makes NaN of every text with token_id in it."""
    engine = tiny_engine(folder, **changes)
    engine._runner.model.model.embed_tokens.weight.data[token_id] = float("nan")
    return engine


@pytest.mark.parametrize("cache_mode", ["absorb", "naive"])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)])
@pytest.mark.parametrize("make_config", [v3_config, v2_config])
def test_nan_logits_end_their_own_request_only(tmp_path, make_config, sampling, cache_mode):
    write_checkpoint(tmp_path, make_config())
    prompts = {"a": PROMPT, "b": PROMPT[4:9], "c": [20, 21]}
    clean = tiny_engine(tmp_path, cache_mode=cache_mode)
    wanted = {name: reply(clean, prompt, sampling) for name, prompt in prompts.items()}
    poison = next(token for token in range(40, VOCABULARY) if not any(token in tokens for tokens in wanted.values()))
    engine = poisoned(tmp_path, poison, cache_mode=cache_mode)
    engine.add(EngineRequest("a", prompts["a"], sampling))
    engine.add(EngineRequest("bad", [*PROMPT[:6], poison, 30], sampling))
    for name in "bc":
        engine.add(EngineRequest(name, prompts[name], sampling))
    outputs = drain(engine)
    assert {name: tokens_of(outputs[name]) for name in prompts} == wanted
    (bad,) = outputs["bad"]
    assert bad.finish_reason is FinishReason.ERROR
    assert isinstance(bad.error, NumericsError)
    assert bad.token_ids == ()
    assert_all_free(engine)
    assert reply(engine, PROMPT, sampling) == wanted["a"]  # the blocks of the bad one harm nobody after it


def test_nan_logits_in_the_middle_of_a_reply_end_it(folder):
    tokens = reply(tiny_engine(folder))
    turning = next(i for i, token in enumerate(tokens) if token not in PROMPT and token not in tokens[:i])
    engine = poisoned(folder, tokens[turning])
    engine.add(EngineRequest("r", PROMPT, GREEDY))
    outputs = drain(engine)["r"]
    assert tokens_of(outputs) == tokens[: turning + 1]
    assert isinstance(outputs[-1].error, NumericsError)
    assert_all_free(engine)


@pytest.mark.parametrize("chunk", [3, 64])
def test_nan_in_a_scored_prompt_ends_its_own_request_only(folder, chunk):
    wanted = reply(tiny_engine(folder))
    assert POISON not in wanted
    engine = poisoned(folder, POISON, max_num_batched_tokens=chunk, max_num_sequences=2)
    engine.add(EngineRequest("good", PROMPT, GREEDY))
    scored = dataclasses.replace(GREEDY, prompt_logprobs=0)
    engine.add(EngineRequest("bad", [3, 4, POISON, 5, 6, 7, 8, 9], scored))
    outputs = drain(engine)
    assert tokens_of(outputs["good"]) == wanted
    (bad,) = outputs["bad"]
    assert isinstance(bad.error, NumericsError)
    assert bad.finish_reason is FinishReason.ERROR
    assert_all_free(engine)


# Logprobs.


@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_prompt_logprobs_are_whole_and_the_same_in_chunks(folder, chunk):
    sampling = dataclasses.replace(GREEDY, prompt_logprobs=3, logprobs=2)
    outputs = []
    for size in (64, chunk):
        engine = tiny_engine(folder, max_num_batched_tokens=size, max_num_sequences=1)
        engine.add(EngineRequest("r", PROMPT, sampling))
        outputs.append(drain(engine)["r"])
    whole, parts = outputs
    assert [each.token_id for each in parts[0].prompt_logprobs] == PROMPT[1:]
    for ours, theirs in zip(parts[0].prompt_logprobs, whole[0].prompt_logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert len(ours.top) == 3
    assert all(output.prompt_logprobs == () for output in parts[1:])
    assert [output.logprobs[0].token_id for output in parts] == tokens_of(parts)


def test_prompt_logprobs_are_whole_after_a_preemption(folder):
    engine = tiny_engine(folder, num_blocks=9, max_num_batched_tokens=8, max_num_sequences=2)
    sampling = dataclasses.replace(GREEDY, prompt_logprobs=0, max_tokens=16)
    for name in "ab":
        engine.add(EngineRequest(name, PROMPT[:6], sampling))
    outputs = drain(engine)
    assert engine.stats().num_preemptions > 0
    for name in "ab":
        assert [each.token_id for each in outputs[name][0].prompt_logprobs] == PROMPT[1:6]
    assert tokens_of(outputs["a"]) == tokens_of(outputs["b"])


def test_a_seeded_reply_does_not_depend_on_the_batch(folder):
    sampling = SamplingParams(temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    alone = reply(tiny_engine(folder), PROMPT, sampling)
    engine = tiny_engine(folder)
    for i in range(5):
        engine.add(EngineRequest(str(i), PROMPT[i:], SamplingParams(max_tokens=9)))
    engine.add(EngineRequest("r", PROMPT, sampling))
    assert tokens_of(drain(engine)["r"]) == alone


def test_what_others_left_in_a_block_reaches_no_reply(folder):
    prompts = [[3 + i] * length for i, length in enumerate((3, 5, 13, 14, 30))]
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    alone = [reply(tiny_engine(folder), prompt, sampling) for prompt in prompts]
    engine = tiny_engine(folder)
    engine.kv_cache.pool.fill_(float("nan"))
    for i, prompt in enumerate(prompts):
        engine.add(EngineRequest(str(i), prompt, sampling))
    outputs = drain(engine)
    assert [tokens_of(outputs[str(i)]) for i in range(len(prompts))] == alone


# Prefixes and blocks held outside.


def test_reports_the_prompt_tokens_it_found(engine):
    reply(engine)
    assert engine.match(PROMPT) == 12
    engine.add(EngineRequest("r", PROMPT, GREEDY))
    assert {output.num_cached_tokens for output in drain(engine)["r"]} == {12}


def test_tenants_with_different_salts_share_nothing(engine):
    wanted = reply(engine, tenant_salt=b"one")
    assert engine.match(PROMPT, b"one") == 12
    assert engine.match(PROMPT, b"two") == engine.match(PROMPT) == 0
    engine.add(EngineRequest("r", PROMPT, GREEDY, tenant_salt=b"two"))
    outputs = drain(engine)["r"]
    assert outputs[0].num_cached_tokens == 0
    assert tokens_of(outputs) == wanted


def test_held_blocks_stay_until_they_are_released(folder):
    engine = tiny_engine(folder, num_blocks=8)
    reply(engine)
    block_ids, num_tokens = engine.hold(PROMPT)
    assert (len(block_ids), num_tokens) == (3, 12)
    engine.add(EngineRequest("r", [40] * 8, GREEDY))
    while engine.has_work:
        engine.step()
    assert engine.match(PROMPT) == 12
    engine.check_integrity([block_ids])
    engine.release_blocks(block_ids)
    assert_all_free(engine)


def test_kept_blocks_are_the_caller_s_after_a_normal_end_only(engine):
    engine.add(EngineRequest("kept", PROMPT, GREEDY, keeps_blocks=True))
    engine.add(EngineRequest("aborted", PROMPT, GREEDY, keeps_blocks=True))
    engine.step()
    engine.abort("aborted")
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    table = outputs[-1].block_table
    assert len(table) == engine.pool.num_blocks_for(len(PROMPT) + 11)
    assert all(output.block_table == () for output in outputs[:-1])
    engine.check_integrity([table])
    assert engine.pool.num_free_blocks == engine.pool.num_blocks - len(table)
    engine.release_blocks(table)
    assert_all_free(engine)


def test_a_reservation_filled_by_hand_gives_the_same_reply(folder):
    source, target = tiny_engine(folder), tiny_engine(folder)
    wanted = reply(source)
    block_ids, num_tokens = source.hold(PROMPT)
    reservation = target.reserve(PROMPT)
    target.kv_cache.pool[reservation.block_table[:3]] = source.kv_cache.pool[block_ids]
    target.arrived(reservation, num_tokens)
    target.add(EngineRequest("r", PROMPT, GREEDY), reservation)
    assert tokens_of(drain(target)["r"]) == wanted
    assert_all_free(target)
    source.release_blocks(block_ids)
    assert_all_free(source)


def test_cancelled_and_quarantined_reservations_come_back(engine):
    engine.cancel(engine.reserve(PROMPT))
    assert_all_free(engine)
    block_ids = engine.quarantine(engine.reserve(PROMPT), 4)
    assert len(block_ids) == 3
    assert engine.pool.num_free_blocks == engine.pool.num_blocks - 3
    engine.readmit(block_ids)
    assert_all_free(engine)


def test_a_resumed_reply_ends_where_the_whole_one_does(engine):
    wanted = reply(engine)
    engine.add(EngineRequest("r", PROMPT, GREEDY, resumed_token_ids=wanted[:5]))
    outputs = drain(engine)["r"]
    assert tokens_of(outputs) == wanted[5:]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


# What it says of itself.


def test_stats_count_what_waits_and_runs(folder):
    engine = tiny_engine(folder, max_num_sequences=1)
    before = engine.stats()
    assert (before.num_blocks, before.num_free_blocks, before.prefill_tokens_per_s) == (64, 64, None)
    for name, token in (("a", 30), ("b", 40)):
        engine.add(EngineRequest(name, [token] * 20, GREEDY))  # long enough to say how fast a prompt is
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 1)
    assert stats.num_running_tokens == 21
    assert stats.num_waiting_tokens == 1 + 20
    drain(engine)
    after = engine.stats()
    assert after.prefill_tokens_per_s > 0
    assert after.decode_tokens_per_s > 0
    assert (after.num_running, after.num_waiting, after.num_free_blocks) == (0, 0, 64)
    assert after.num_running_tokens == 0


def test_the_model_fingerprint_is_that_of_the_architecture(folder, tmp_path):
    write_checkpoint(tmp_path, v2_config())
    engines = [tiny_engine(folder), tiny_engine(folder, cache_mode="naive"), tiny_engine(tmp_path)]
    fingerprints = [engine.model_fingerprint for engine in engines]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert len({engine.layout.fingerprint for engine in engines}) == 3


def test_an_idle_engine_steps_to_nothing(engine):
    assert engine.step() == []
    assert engine.is_stuck
    assert_all_free(engine)
