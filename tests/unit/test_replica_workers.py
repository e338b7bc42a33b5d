"""Prefill and decode workers: the tokens of one process whatever is handed over, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from services.common.errors import (
    AntiphonError,
    InvalidRequest,
    OutOfBlocks,
    PromptTooLong,
    QueueFull,
    StaleLease,
    Unavailable,
)
from services.common.messages import PrefillPlace
from services.common.sampling import FinishReason, SamplingParams
from services.decode.turn import DecodeFinished, TokenChunk
from services.engine.engine import Engine
from tests.unit.replica_group import (
    GREEDY,
    SALT,
    Group,
    Reply,
    held_by,
    one_process,
    prompt,
    request,
    running_group,
    tiny_engine,
)


@pytest.fixture(scope="module")
def oracle() -> Engine:
    """Computes everything afresh."""
    return tiny_engine(prefix_caching=False)


@pytest.fixture
async def group() -> AsyncIterator[Group]:
    """Prefill is always asked."""
    async with running_group() as group:
        yield group


async def test_prefill_computes_and_decode_goes_on(group: Group, oracle: Engine) -> None:
    reply = await group.turn(request(prompt(1, 100)))
    assert reply.token_ids == one_process(oracle, prompt(1, 100)).token_ids
    assert [chunk.index for chunk in reply.chunks] == list(range(10))
    assert reply.origins == [("prefill", "prefill-a", 100)]
    assert reply.end.prefill_place is PrefillPlace.PREFILL
    assert reply.end.reason is FinishReason.LENGTH
    assert (reply.end.usage.num_prompt_tokens, reply.end.usage.num_cached_tokens) == (100, 0)
    assert reply.end.timings.transfer_bytes == 7 * group.first.engine.layout.bytes_per_block
    assert reply.end.num_computed_tokens == 96


async def test_only_what_decode_lacks_comes_back_and_only_what_prefill_lacks_goes_there(
    group: Group, oracle: Engine
) -> None:
    history = prompt(2, 60)
    history += (await group.turn(request(history))).token_ids
    again = history + prompt(3, 40)
    reply = await group.turn(request(again))
    assert reply.token_ids == one_process(oracle, again).token_ids
    assert reply.origins == [("local", "decode-a", 64), ("prefill", "prefill-a", 46)]
    # Prefill has 48 tokens of the first prompt; the block with the reply's first tokens is what it fetches.
    (asked,) = group.peers.requests
    assert (asked.first_token, len(asked.into_block_ids)) == (48, 1)
    bytes_per_block = group.first.engine.layout.bytes_per_block
    assert reply.end.timings.transfer_bytes == (3 + 1) * bytes_per_block


async def test_blocks_that_prefill_had_already_count_as_cached(group: Group) -> None:
    await group.turn(request(prompt(4, 80)))
    reply = await group.turn(request(prompt(4, 80) + prompt(5, 10)), group.second)
    assert reply.origins == [("fetched", "prefill-a", 80), ("prefill", "prefill-a", 10)]
    assert reply.end.usage.num_cached_tokens == 80


async def test_a_turn_that_moves_fetches_the_history_from_its_holder(oracle: Engine) -> None:
    async with running_group(remote_prefill="never", num_blocks=128) as group:
        history = prompt(6, 400)
        history += (await group.turn(request(history))).token_ids
        again = history + prompt(7, 20)
        reply = await group.turn(request(again, holders=held_by(group.first, 400)), group.second)
        assert reply.token_ids == one_process(oracle, again).token_ids
        assert reply.origins == [("fetched", "decode-a", 400), ("computed", "decode-b", 30)]
        assert "turned off" in reply.end.prefill_reason


async def test_the_copy_that_a_moved_session_leaves_behind_is_evicted_before_sessions_that_stay(oracle: Engine) -> None:
    async with running_group(remote_prefill="never", num_blocks=12) as group:
        staying, moving = prompt(37, 64), prompt(38, 64)
        await group.turn(request(staying, session_digest="staying"))
        await group.turn(request(moving, session_digest="moving"))
        holders = held_by(group.first, 64)
        await group.turn(request(moving + prompt(39, 8), session_digest="moving", holders=holders), group.second)
        await group.until_idle()
        assert [each.digest for each in group.held["decode-a"].recent_first()] == ["staying"]
        await group.turn(request(prompt(40, 100)))
        assert group.first.engine.match(staying, SALT) == 64
        assert group.first.engine.match(moving, SALT) < 64


async def test_lending_history_to_prefill_does_not_cost_it_its_place(group: Group) -> None:
    history = prompt(41, 60)
    history += (await group.turn(request(history, session_digest="asked"))).token_ids
    await group.turn(request(history + prompt(42, 40), session_digest="asked"))
    assert [asked.moved_session for asked in group.peers.requests] == [""]
    assert [each.digest for each in group.held["decode-a"].recent_first()] == ["asked"]


async def test_a_holder_that_has_lost_the_history_costs_a_prefill_only(oracle: Engine) -> None:
    async with running_group(remote_prefill="never") as group:
        reply = await group.turn(request(prompt(8, 400), holders=held_by(group.first, 384)), group.second)
        assert reply.token_ids == one_process(oracle, prompt(8, 400)).token_ids
        assert reply.origins == [("computed", "decode-b", 400)]


async def test_another_incarnation_of_the_holder_offers_nothing(group: Group) -> None:
    await group.turn(request(prompt(9, 400)))
    holders = held_by(group.first, 400)
    group.first.exchange.identity = type(group.first.identity)("decode-a", "decode-a-2")
    reply = await group.turn(request(prompt(9, 400), holders=holders), group.second)
    assert all(name != "decode-a" for _, name, _ in reply.origins)


SAMPLINGS = {
    "seeded": SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True, logprobs=3),
    "penalties": SamplingParams(
        temperature=0.0,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        max_tokens=12,
        ignore_eos=True,
    ),
    "bias": SamplingParams(temperature=0.0, logit_bias={17: 50.0}, max_tokens=4, logprobs=0),
    "one token": SamplingParams(temperature=0.0, max_tokens=1, logprobs=2),
}


@pytest.mark.parametrize("name", SAMPLINGS)
async def test_sampling_is_the_same_when_prefill_samples_the_first_token(
    group: Group, oracle: Engine, name: str
) -> None:
    reply = await group.turn(request(prompt(10, 50), SAMPLINGS[name]))
    expected = one_process(oracle, prompt(10, 50), SAMPLINGS[name])
    assert reply.token_ids == expected.token_ids
    ours = [each for chunk in reply.chunks for each in chunk.logprobs]
    theirs = [each for chunk in expected.chunks for each in chunk.logprobs]
    assert [each.token_id for each in ours] == [each.token_id for each in theirs]
    assert [each.logprob for each in ours] == pytest.approx([each.logprob for each in theirs], abs=1e-4)
    assert [len(each.top) for each in ours] == [len(each.top) for each in theirs]


async def test_a_stop_token_that_prefill_samples_ends_the_turn(group: Group, oracle: Engine) -> None:
    first = one_process(oracle, prompt(11, 50)).token_ids[0]
    sampling = SamplingParams(temperature=0.0, max_tokens=10, stop_token_ids=(first,))
    reply = await group.turn(request(prompt(11, 50), sampling))
    assert reply.token_ids == (first,)
    assert reply.end.reason is FinishReason.STOP
    assert reply.end.num_computed_tokens == 48
    # The blocks are there for the next turn.
    assert (await group.turn(request((*prompt(11, 50), first, 9)))).origins[0] == ("local", "decode-a", 48)


@pytest.mark.parametrize("mode", ["always", "never"])
@pytest.mark.parametrize("num_sent", [1, 5])
async def test_a_resumed_reply_goes_on_where_it_stood(oracle: Engine, mode: str, num_sent: int) -> None:
    for sampling in (GREEDY, SAMPLINGS["seeded"], SAMPLINGS["penalties"]):
        expected = one_process(oracle, prompt(12, 40), sampling).token_ids
        async with running_group(remote_prefill=mode) as group:
            reply = await group.turn(request(prompt(12, 40), sampling, resumed_token_ids=expected[:num_sent]))
        assert reply.token_ids == expected[num_sent:]
        assert reply.chunks[0].index == num_sent
        assert reply.end.usage.num_generated_tokens == len(expected)
        assert sum(num_tokens for _, _, num_tokens in reply.origins) == 40


async def test_prompt_logprobs_are_computed_here_in_full(group: Group, oracle: Engine) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=1)
    await group.turn(request(prompt(13, 40)))
    num_calls = group.prefill.num_calls
    reply = await group.turn(request(prompt(13, 40), sampling))
    assert group.prefill.num_calls == num_calls
    assert len(reply.chunks[0].prompt_logprobs) == 39
    assert reply.token_ids == one_process(oracle, prompt(13, 40), sampling).token_ids
    assert reply.origins == [("computed", "decode-a", 40)]
    assert "logprobs" in reply.end.prefill_reason


async def test_without_reuse_every_turn_is_cold(oracle: Engine) -> None:
    async with running_group(reuse_history=False) as group:
        for _ in range(2):
            reply = await group.turn(request(prompt(14, 70)))
            assert reply.token_ids == one_process(oracle, prompt(14, 70)).token_ids
            assert reply.origins == [("prefill", "prefill-a", 70)]
            assert reply.end.num_computed_tokens == 0


async def test_a_prompt_held_here_in_full_needs_no_prefill(group: Group, oracle: Engine) -> None:
    await group.turn(request(prompt(15, 64)))
    reply = await group.turn(request(prompt(15, 64)))
    assert group.prefill.num_calls == 1
    assert reply.token_ids == one_process(oracle, prompt(15, 64)).token_ids
    assert reply.origins == [("local", "decode-a", 48), ("computed", "decode-a", 16)]
    assert reply.end.prefill_reason == "everything is held here"


# Between replicas things go wrong.


async def test_a_lost_prefill_replica_is_replaced_once(group: Group, oracle: Engine) -> None:
    group.prefill.errors = [Unavailable("lost")]
    reply = await group.turn(request(prompt(16, 60)))
    assert reply.token_ids == one_process(oracle, prompt(16, 60)).token_ids
    assert (group.prefill.num_calls, reply.end.prefill_place) == (2, PrefillPlace.PREFILL)


@pytest.mark.parametrize(
    ("errors", "num_calls"),
    [([Unavailable("lost"), Unavailable("lost")], 2), ([OutOfBlocks("full")], 1), ([QueueFull("full")], 1)],
)
async def test_without_an_answer_from_prefill_the_prompt_is_computed_here(
    group: Group, oracle: Engine, errors: list[AntiphonError], num_calls: int
) -> None:
    group.prefill.errors = errors
    reply = await group.turn(request(prompt(17, 60)))
    assert reply.token_ids == one_process(oracle, prompt(17, 60)).token_ids
    assert group.prefill.num_calls == num_calls
    assert reply.end.prefill_place is PrefillPlace.DECODE
    assert "failed" in reply.end.prefill_reason
    assert reply.origins == [("computed", "decode-a", 60)]


async def test_blocks_that_arrive_damaged_are_computed_again(group: Group, oracle: Engine) -> None:
    group.prefill.damages_blocks = True
    reply = await group.turn(request(prompt(18, 60)))
    assert reply.token_ids == one_process(oracle, prompt(18, 60)).token_ids
    assert reply.origins == [("computed", "decode-a", 60)]
    assert reply.end.prefill_place is PrefillPlace.DECODE
    assert group.first.count("kv_transfer_failures", reason="digest") == 1


async def test_blocks_of_a_transfer_given_up_are_not_used_for_a_while(oracle: Engine) -> None:
    async with running_group(quarantine_s=1e6, ends_idle=False) as group:
        group.first.transfer.num_timeouts = 1
        reply = await group.turn(request(prompt(19, 60)))
        assert reply.token_ids == one_process(oracle, prompt(19, 60)).token_ids
        assert group.first.engine.pool.num_quarantined_blocks == 4


async def test_blocks_in_quarantine_come_back(group: Group, oracle: Engine) -> None:
    group.first.transfer.num_timeouts = 1
    reply = await group.turn(request(prompt(19, 60)))
    assert reply.token_ids == one_process(oracle, prompt(19, 60)).token_ids
    assert group.first.count("kv_transfer_failures", reason="timeout") == 1
    await group.until_idle()
    assert group.first.engine.pool.num_quarantined_blocks == 0


async def test_with_no_blocks_left_beside_the_quarantine_the_turn_waits_and_ends_well(oracle: Engine) -> None:
    async with running_group(num_blocks=6) as group:
        group.first.transfer.num_timeouts = 1
        reply = await group.turn(request(prompt(20, 60)))
        assert reply.token_ids == one_process(oracle, prompt(20, 60)).token_ids


async def test_prefill_computes_history_that_it_cannot_fetch(group: Group, oracle: Engine) -> None:
    history = prompt(21, 60)
    history += (await group.turn(request(history))).token_ids
    group.peers.num_lost = 1
    again = history + prompt(22, 20)
    reply = await group.turn(request(again))
    assert reply.token_ids == one_process(oracle, again).token_ids
    group.prefill_replica.transfer.num_timeouts = 1
    again += reply.token_ids + prompt(23, 20)
    assert (await group.turn(request(again))).token_ids == one_process(oracle, again).token_ids


async def test_a_turn_cancelled_at_any_moment_leaves_nothing_behind(oracle: Engine) -> None:
    rng = random.Random(0)
    async with running_group() as group:
        history = prompt(24, 60)
        history += (await group.turn(request(history))).token_ids
        holders = held_by(group.first, 64)
        for i in range(60):
            tokens = history[:64] + prompt(30 + i, 40)
            task = asyncio.ensure_future(group.turn(request(tokens, holders=holders), group.second))
            await asyncio.sleep(rng.uniform(0, 0.06))
            task.cancel()
            await asyncio.wait({task})
            await group.until_idle()
        assert (await group.turn(request(history), group.second)).token_ids == one_process(oracle, history).token_ids


async def test_closing_the_stream_ends_the_sequence(group: Group) -> None:
    async with aclosing(group.workers["decode-a"].generate(request(prompt(25, 60)))) as events:
        assert [await anext(events) for _ in range(4)]
    await group.until_idle()


async def test_turns_at_once_are_the_same_as_one_after_another(oracle: Engine) -> None:
    async with running_group(num_blocks=40, remote_prefill="auto") as group:
        prompts = [prompt(i, 30 + 9 * i) for i in range(10)]
        turns = [group.turn(request(each), replica) for each in prompts for replica in (group.first, group.second)]
        replies = await asyncio.gather(*turns, return_exceptions=True)
        for i, reply in enumerate(replies):
            if not isinstance(reply, OutOfBlocks):
                assert not isinstance(reply, BaseException)
                assert reply.token_ids == one_process(oracle, prompts[i // 2]).token_ids
        assert sum(isinstance(reply, OutOfBlocks) for reply in replies) < len(replies)


async def test_a_stopped_reply_ends_with_an_account_of_all_that_went_before(group: Group) -> None:
    worker, asked = group.workers["decode-a"], request(prompt(33, 60), call_id="call")
    events = worker.generate(asked)
    reply = Reply()
    async for event in events:
        if isinstance(event, TokenChunk):
            reply.chunks.append(event)
            if len(reply.chunks) == 3:
                worker.stop("call")
        elif isinstance(event, DecodeFinished):
            reply.finished = event
    assert reply.end.reason is FinishReason.STOP
    assert 3 <= len(reply.token_ids) < 10
    assert reply.origins == [("prefill", "prefill-a", 60)]
    assert reply.end.timings.prefill_ms > 0
    worker.stop("call")  # of a call that has ended: nothing


async def test_blocks_of_a_forgotten_session_are_evicted_first(oracle: Engine) -> None:
    async with running_group(num_blocks=12, remote_prefill="never") as group:
        worker = group.workers["decode-a"]
        kept, gone = prompt(34, 64), prompt(35, 64)
        await group.turn(request(kept, session_digest="kept"))
        await group.turn(request(gone, session_digest="gone"))  # used last: would be evicted last
        assert await worker.forget("gone", gone, SALT) == 4
        assert [each.digest for each in group.held["decode-a"].recent_first()] == ["kept"]
        await group.turn(request(prompt(36, 100)))
        assert group.first.engine.match(kept, SALT) == 64
        assert group.first.engine.match(gone, SALT) < 64


# Refused before any work.


async def test_a_turn_that_finds_no_room_is_refused(oracle: Engine) -> None:
    async with running_group(num_blocks=8) as group:
        async with aclosing(group.workers["decode-a"].generate(request(prompt(26, 100)))) as events:
            await anext(events)
            with pytest.raises(OutOfBlocks):
                await group.turn(request(prompt(27, 100)))
            assert group.workers["decode-a"].num_refused_blocks == 7  # the policy hears of it
        await group.until_idle()
        assert (await group.turn(request(prompt(27, 100)))).token_ids


async def test_a_prompt_that_can_never_fit_is_too_long(group: Group) -> None:
    with pytest.raises(PromptTooLong):
        await group.turn(request(prompt(28, 512)))


async def test_a_token_outside_of_the_vocabulary_is_refused(group: Group) -> None:
    with pytest.raises(InvalidRequest):
        await group.turn(request((*prompt(29, 10), 512)))


async def test_an_older_fence_is_refused(group: Group) -> None:
    def turn(fence: int, session: str = "session") -> object:
        return group.turn(request(prompt(30, 10), session_digest=session, fence=fence))

    await turn(5)
    await turn(5)
    with pytest.raises(StaleLease):
        await turn(4)
    await turn(4, "another")
    await turn(6)
    assert group.first.count("fence_rejections") == 1
