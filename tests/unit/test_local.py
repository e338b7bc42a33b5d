"""The one-process pipeline with the demo model: conversations, stop strings, batches, scores."""

import math
from pathlib import Path

import pytest
import torch

from services.common.errors import InvalidCheckpoint, InvalidRequest, PromptTooLong, QueueFull, SessionBusy
from services.common.messages import Delta, Finished, Message
from services.common.sampling import FinishReason, SamplingParams
from services.common.settings import EngineSettings, ModelSettings
from services.local import LocalPipeline, LocalRequest

V3 = Path(__file__).parents[1] / "data/checkpoints/v3"
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
QUESTIONS = ("Hello! Who are you?", "Tell me a short story about a cat.", "And what happened then?")
BLOCK = 16


def load(path="demo", **engine):
    options = {"device": "cpu", "num_threads": 1, "kv_cache_bytes": 32 * 2**20} | engine
    return LocalPipeline.load(ModelSettings(path=str(path), max_seq_len=1024), EngineSettings(**options))


@pytest.fixture(scope="module")
def shared():
    return load()


@pytest.fixture
def pipeline(shared):
    """The same weights for all tests; each must leave the block pool as it should be."""
    yield shared
    assert_clean(shared)


def assert_clean(pipeline):
    engine = pipeline.engine
    engine.check_integrity()
    assert not engine.has_work
    assert engine.pool.num_free_blocks == engine.pool.num_blocks


def collect(events):
    """(text, token ids, Finished) of one reply."""
    events = list(events)
    deltas = [event for event in events if isinstance(event, Delta)]
    assert isinstance(events[-1], Finished)
    assert len(deltas) == len(events) - 1
    ids = [token for delta in deltas for token in delta.token_ids]
    assert events[-1].usage.num_generated_tokens == len(ids)
    return "".join(delta.text for delta in deltas), ids, events[-1]


def say(session, text, sampling=GREEDY):
    return collect(session.turn([Message("user", text)], sampling))


def replies_of(pipeline, requests):
    """Token ids of each reply, all in one batch."""
    replies = [[] for _ in requests]
    for index, event in pipeline.run(requests):
        if isinstance(event, Delta):
            replies[index] += event.token_ids
    return replies


# Conversations.


def test_each_turn_finds_every_full_block_of_its_history(pipeline):
    session = pipeline.session(b"history")
    for number, question in enumerate(QUESTIONS):
        history = len(session.history)
        _, ids, finished = say(session, question)
        # The token sampled last has no KV yet.
        assert finished.usage.num_cached_tokens == max(0, history - 1) // BLOCK * BLOCK
        assert finished.usage.num_prompt_tokens + len(ids) == len(session.history)
        assert session.num_turns == number + 1
    assert finished.usage.num_cached_tokens > BLOCK


def test_a_conversation_is_the_same_with_and_without_reuse(pipeline):
    cold = load(prefix_caching=False)
    warm_session, cold_session = pipeline.session(b"reuse"), cold.session()
    for question in QUESTIONS:
        text, ids, finished = say(warm_session, question)
        cold_text, cold_ids, cold_finished = say(cold_session, question)
        assert (text, ids) == (cold_text, cold_ids)
        assert cold_finished.usage.num_cached_tokens == 0
    assert finished.usage.num_cached_tokens > 0
    assert warm_session.history == cold_session.history
    assert_clean(cold)


def test_the_history_is_the_prompt_and_the_tokens_as_sampled(pipeline):
    session = pipeline.session()
    _, first, _ = say(session, QUESTIONS[0])
    before = list(session.history)
    assert before[-len(first) :] == first
    _, second, _ = say(session, QUESTIONS[1])
    assert session.history[: len(before)] == before
    assert session.history[-len(second) :] == second
    assert session.history.count(pipeline.text.bos_token_id) == 1


def test_exactly_one_end_token_stands_between_turns_however_the_reply_ended(pipeline):
    (eos,) = pipeline.engine.eos_token_ids
    for max_tokens in (2, 60):
        session = pipeline.session()
        _, ids, finished = say(session, QUESTIONS[0], SamplingParams(temperature=0.0, max_tokens=max_tokens))
        assert finished.reason is (FinishReason.LENGTH if max_tokens == 2 else FinishReason.STOP)
        assert (ids[-1] == eos) is (max_tokens == 60)
        end_of_reply = len(session.history)
        say(session, QUESTIONS[1])
        assert session.history[end_of_reply - 1 : end_of_reply + 3].count(eos) == 1


def test_tenants_share_no_blocks(pipeline):
    question = QUESTIONS[1] * 2
    cached = [say(pipeline.session(salt), question)[2].usage.num_cached_tokens for salt in (b"1", b"2", b"1")]
    assert cached == [0, 0, BLOCK]


def test_a_turn_closed_early_leaves_what_was_said_in_the_history(pipeline):
    session, whole = pipeline.session(b"early"), pipeline.session(b"early-whole")
    _, all_ids, _ = say(whole, QUESTIONS[1])
    turn = session.turn([Message("user", QUESTIONS[1])], GREEDY)
    heard = [next(turn) for _ in range(3)]
    turn.close()
    assert_clean(pipeline)
    said = [token for event in heard for token in event.token_ids]
    assert said == all_ids[:3]
    assert session.history == whole.history[: len(session.history)]
    assert session.history[-3:] == said
    assert session.num_turns == 1
    history = len(session.history)
    assert say(session, QUESTIONS[2])[2].usage.num_cached_tokens == (history - 1) // BLOCK * BLOCK


def test_a_second_turn_on_a_busy_session_is_refused(pipeline):
    session = pipeline.session(b"busy")
    turn = session.turn([Message("user", QUESTIONS[0])], GREEDY)
    next(turn)
    with pytest.raises(SessionBusy) as refused:
        say(session, QUESTIONS[1])
    assert session.session_id in str(refused.value)
    turn.close()
    say(session, QUESTIONS[1])
    assert session.num_turns == 2


def test_a_turn_closed_before_its_first_token_leaves_no_trace(pipeline):
    session = pipeline.session()
    session.turn([Message("user", "Hi")], GREEDY).close()
    assert (session.history, session.num_turns) == ([], 0)


def test_a_refused_turn_leaves_no_trace(pipeline):
    session = pipeline.session()
    say(session, "Hi")
    before = list(session.history)
    with pytest.raises(PromptTooLong):
        say(session, "word " * 2000)
    with pytest.raises(InvalidRequest, match="messages"):
        collect(session.turn([], GREEDY))
    assert (session.history, session.num_turns) == (before, 1)


def test_two_open_turns_do_not_disturb_each_other(pipeline):
    alone = [say(pipeline.session(), question) for question in QUESTIONS[:2]]
    turns = [pipeline.session().turn([Message("user", question)], GREEDY) for question in QUESTIONS[:2]]
    heard = [[next(turns[0]), next(turns[0])], [next(turns[1])]]
    score = pipeline.score([5, 6, 7, 8])
    assert len(score.logprobs) == 3
    heard[1] += turns[1]
    heard[0] += turns[0]
    for events, (text, ids, _) in zip(heard, alone, strict=True):
        assert collect(events)[:2] == (text, ids)


# How replies end.


def test_max_tokens_ends_with_length(pipeline):
    _, ids, finished = say(pipeline.session(), QUESTIONS[1], SamplingParams(temperature=0.0, max_tokens=5))
    assert len(ids) == 5
    assert finished.reason is FinishReason.LENGTH


def test_a_stop_string_across_tokens_ends_with_stop_and_is_not_shown(pipeline):
    text, ids, _ = say(pipeline.session(), QUESTIONS[1])
    pieces = [pipeline.text.decode([token]) for token in ids]
    # The end of one token and the beginning of the next.
    start = sum(map(len, pieces[:9])) - 1
    stop = text[start : start + 3]
    assert all(stop not in piece for piece in pieces)
    sampling = SamplingParams(temperature=0.0, max_tokens=24, stop=("never said", stop))
    session = pipeline.session()
    stopped, stopped_ids, finished = say(session, QUESTIONS[1], sampling)
    assert finished.reason is FinishReason.STOP
    assert stopped == text[: text.index(stop)]
    assert stopped_ids == ids[: len(stopped_ids)]
    assert len(stopped_ids) < len(ids)
    assert session.history[-len(stopped_ids) :] == stopped_ids
    assert_clean(pipeline)


def test_a_stop_string_completed_by_the_last_token_allowed_ends_with_stop(pipeline):
    text, ids, _ = say(pipeline.session(), QUESTIONS[1], SamplingParams(temperature=0.0, max_tokens=6))
    stop = pipeline.text.decode(ids[-1:])
    assert text.index(stop) == len(text) - len(stop)
    sampling = SamplingParams(temperature=0.0, max_tokens=6, stop=(stop,))
    stopped, _, finished = say(pipeline.session(), QUESTIONS[1], sampling)
    assert (stopped, finished.reason) == (text[: -len(stop)], FinishReason.STOP)


def test_text_held_back_for_a_stop_string_comes_at_the_end(pipeline):
    text, _, _ = say(pipeline.session(), QUESTIONS[1])
    sampling = SamplingParams(temperature=0.0, max_tokens=24, stop=(text[-2:] + "never said",))
    assert say(pipeline.session(), QUESTIONS[1], sampling)[0] == text


# Sampling.

PROMPTS = ([0, 300, 400, 500], [0, 17, 18], [0, *range(100, 140)], [0, 900])


def sampled(seed, max_tokens=16):
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True)


def test_seeds_make_replies_reproducible_and_differ_from_each_other(pipeline):
    first, again, other = (replies_of(pipeline, [LocalRequest(PROMPTS[0], sampled(seed))]) for seed in (7, 7, 8))
    assert first == again != other


def test_a_seeded_reply_does_not_depend_on_what_else_is_in_the_batch(pipeline):
    requests = [LocalRequest(prompt, sampled(40 + i)) for i, prompt in enumerate(PROMPTS)]
    together = replies_of(pipeline, requests)
    assert together == [replies_of(pipeline, [request])[0] for request in requests]
    assert together[::-1] == replies_of(pipeline, requests[::-1])


def test_more_requests_than_may_wait_are_all_served():
    pipeline = load(max_num_waiting=2, max_num_sequences=2)
    requests = [LocalRequest([0, 50 + i], GREEDY) for i in range(9)]
    replies = replies_of(pipeline, requests)
    assert all(replies)
    assert replies == [replies_of(pipeline, [request])[0] for request in requests]
    assert_clean(pipeline)


def test_a_queue_that_others_fill_refuses():
    pipeline = load(max_num_waiting=1, max_num_sequences=1)
    both = pipeline.run([LocalRequest([0, 60], GREEDY), LocalRequest([0, 61], GREEDY)])
    heard = [next(both)[0], next(both)[0]]
    assert heard == [0, 0]  # the first of them runs, so the second one waits
    with pytest.raises(QueueFull):
        next(pipeline.run([LocalRequest([0, 50], GREEDY)]))
    both.close()
    assert_clean(pipeline)


def test_closing_a_run_aborts_all_of_it(pipeline):
    run = pipeline.run([LocalRequest(prompt, GREEDY) for prompt in PROMPTS])
    next(run)
    assert pipeline.engine.stats().num_running == len(PROMPTS)
    run.close()
    assert_clean(pipeline)


def test_a_bad_request_ends_the_run_with_nothing_left(pipeline):
    requests = [LocalRequest(PROMPTS[0], GREEDY), LocalRequest([10**6], GREEDY)]
    with pytest.raises(InvalidRequest, match="token ids are 0 to"):
        replies_of(pipeline, requests)


# Scores.


def test_score_is_what_the_logits_say(pipeline):
    token_ids = [0, *range(200, 240)]
    parts = {}
    score = pipeline.score(token_ids, 2, lambda first, rows: parts.update({first: rows.clone()}))
    logits = torch.cat([parts[first] for first in sorted(parts)])
    assert logits.shape == (len(token_ids), pipeline.engine.config.vocab_size)
    wanted = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([each.logprob for each in score.logprobs]), wanted)
    assert score.perplexity == pytest.approx(math.exp(-wanted.mean()), rel=1e-5)
    assert [each.token_id for each in score.logprobs] == token_ids[1:]
    assert all(len(each.top) == 2 for each in score.logprobs)


def test_a_single_token_has_no_perplexity(pipeline):
    score = pipeline.score([5])
    assert score.logprobs == ()
    assert math.isnan(score.perplexity)


# A checkpoint without a tokenizer.


def test_a_checkpoint_without_a_tokenizer_serves_token_ids_only():
    pipeline = load(V3)
    (reply,) = replies_of(pipeline, [LocalRequest([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=4))])
    assert len(reply) == 4
    assert len(pipeline.score([5, 6, 7]).logprobs) == 2
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.json"):
        pipeline.session()
    with pytest.raises(InvalidRequest, match=r"sampling\.stop"):
        replies_of(pipeline, [LocalRequest([5, 6, 7], SamplingParams(stop=("x",)))])
    assert_clean(pipeline)
