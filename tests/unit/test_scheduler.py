import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from services.common.errors import InvalidRequest, OutOfBlocks, PromptTooLong, QueueFull
from services.common.prefix_hash import PrefixHasher
from services.common.sampling import FinishReason, SamplingParams
from services.engine.block_pool import BlockPool
from services.engine.scheduler import Chunk, Scheduler, SchedulerConfig
from services.engine.sequence import Sequence, SequenceStatus

BLOCK = 4
EOS = 0
HASHER = PrefixHasher(b"model", BLOCK)


def next_token(token_ids):
    """The model of these tests: depends on every token before, and ends a reply after some 40 tokens."""
    return hash(tuple(token_ids)) % 40


def digests(token_ids):
    """What the KV of each token is worth: a value that depends on the token and on all before it."""
    result, digest = [], 0
    for token_id in token_ids:
        digest = hash((digest, token_id))
        result.append(digest)
    return result


def reply_to(prompt, max_tokens, max_seq_len):
    """What a sequence must generate, whatever happens around it."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS or len(tokens) - len(prompt) == max_tokens or len(tokens) == max_seq_len:
            return tokens[len(prompt) :]


@dataclass
class Cache:
    """The content of the KV cache, slot by slot, and the rules for writing to it."""

    pool: BlockPool
    slots: dict[tuple[int, int], int | None] = field(default_factory=dict)

    def write(self, table, start, values):
        for position, value in enumerate(values, start):
            block_id = table[position // BLOCK]
            assert self.pool._num_references[block_id] == 1, f"block {block_id} is written, but not by its only user"
            assert self.pool._hash_of[block_id] is None, f"block {block_id} is findable and written to"
            self.slots[block_id, position % BLOCK] = value

    def check(self, table, expected):
        found = [self.slots.get((table[position // BLOCK], position % BLOCK)) for position in range(len(expected))]
        assert found == expected, "the table's slots hold something other than the sequence's own prefix"


class Engine:
    """A scheduler with a simulated model and cache; every step checks content, budget and blocks."""

    def __init__(self, num_blocks=64, budget=64, num_sequences=8, max_seq_len=64, num_waiting=100):
        self.pool = BlockPool(num_blocks, BLOCK)
        self.cache = Cache(self.pool)
        self.scheduler = Scheduler(SchedulerConfig(budget, num_sequences, max_seq_len, num_waiting), self.pool)
        self.num_steps = 0

    def sequence(self, seq_id, prompt, max_tokens=None, **options):
        sampling = SamplingParams(max_tokens=max_tokens, prompt_logprobs=options.pop("prompt_logprobs", None))
        return Sequence(seq_id, prompt, sampling, HASHER, eos_token_ids=[EOS], **options)

    def add(self, seq_id, prompt, max_tokens=None, reservation=None, **options):
        seq = self.sequence(seq_id, prompt, max_tokens, **options)
        self.scheduler.add(seq, reservation)
        return seq

    def fill(self, reservation, num_tokens):
        """A transfer that brings the KV of the first `num_tokens` tokens."""
        start = reservation.num_computed_tokens
        self.cache.write(reservation.block_table, start, digests(reservation.token_ids)[start:num_tokens])
        self.scheduler.arrived(reservation, num_tokens)

    def compute(self, chunks):
        config = self.scheduler.config
        assert sum(chunk.num_tokens for chunk in chunks) <= config.max_num_batched_tokens
        assert len({chunk.seq.seq_id for chunk in chunks}) == len(chunks) <= config.max_num_sequences
        for chunk in chunks:
            seq, end = chunk.seq, chunk.start + chunk.num_tokens
            assert chunk.num_tokens >= 1
            assert chunk.start == seq.num_computed_tokens
            assert end <= min(seq.num_tokens, len(seq.block_table) * BLOCK)
            values = digests(seq.token_ids[:end])
            self.cache.write(seq.block_table, chunk.start, values[chunk.start :])
        # All chunks are in the cache before any is read: a batch writes its KV first, then attends.
        for chunk in chunks:
            self.cache.check(chunk.seq.block_table, digests(chunk.seq.token_ids[: chunk.start + chunk.num_tokens]))
        return {chunk.seq.seq_id: next_token(chunk.seq.token_ids) for chunk in chunks if chunk.samples}

    def step(self, held_outside=()):
        chunks = self.scheduler.schedule()
        finished = self.scheduler.commit(chunks, self.compute(chunks))
        self.scheduler.check_integrity(held_outside)
        self.num_steps += 1
        return chunks, finished

    def run(self, limit=1000):
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"not done after {limit} steps")


def sizes(chunks):
    return {chunk.seq.seq_id: chunk.num_tokens for chunk in chunks}


# A step


def test_generates_what_the_model_alone_would():
    engine = Engine()
    sequences = [engine.add(str(number), range(1, 3 + number), max_tokens=9) for number in range(17)]
    engine.run()
    for seq in sequences:
        assert seq.generated_token_ids == reply_to(seq.token_ids[: seq.num_prompt_tokens], 9, 64)
        assert seq.finish_reason is (FinishReason.STOP if seq.token_ids[-1] == EOS else FinishReason.LENGTH)
    assert engine.pool.num_free_blocks == engine.pool.num_blocks


def test_prompts_and_replies_share_a_step():
    engine = Engine(budget=16)
    engine.add("short", [1, 2, 3])
    engine.step()
    engine.add("long", [9] * 40)
    chunks, _ = engine.step()
    assert sizes(chunks) == {"short": 1, "long": 15}
    assert [chunk.samples for chunk in chunks] == [True, False]


def test_only_the_chunk_that_reaches_the_last_token_samples():
    engine = Engine(budget=8)
    seq = engine.add("a", [9] * 20)
    assert [engine.step()[0][0].samples for _ in range(3)] == [False, False, True]
    assert seq.num_generated_tokens == 1


def test_a_chunk_remembers_that_it_sampled():
    engine = Engine()
    engine.add("a", [1, 2, 3])
    (chunk,), _ = engine.step()
    assert chunk.samples


def test_every_running_sequence_gets_a_token_in_every_step():
    engine = Engine(budget=4, num_sequences=4)
    for number in range(4):
        engine.add(str(number), [number + 1] * 30, max_tokens=2)
    while engine.scheduler.has_work:
        running = engine.scheduler.num_running
        chunks, _ = engine.step()
        assert len(chunks) >= running


def test_a_huge_prompt_does_not_hold_up_a_short_one():
    engine = Engine(num_blocks=600, budget=32, max_seq_len=2100)
    engine.add("huge", [7] * 2000)
    engine.step()
    short = engine.add("short", [8] * 12)
    engine.step()
    engine.step()
    assert short.num_generated_tokens >= 1


def test_the_first_of_equal_prompts_is_done_first_and_the_others_move_on():
    engine = Engine(num_blocks=2000, budget=512, max_seq_len=2100)
    first, second = engine.add("first", [7] * 1500), engine.add("second", [8] * 1500)
    done_after = {}
    for number in range(1, 8):
        chunks, _ = engine.step()
        assert number > 1 or sizes(chunks) == {"first": 352, "second": 160}
        for seq in (first, second):
            if seq.num_generated_tokens:
                done_after.setdefault(seq.seq_id, number)
    assert done_after["first"] < done_after["second"] <= 6


def test_many_prompts_at_once_are_computed_in_chunks_worth_their_while():
    engine = Engine(num_blocks=2000, budget=512, num_sequences=100, max_seq_len=2100)
    for number in range(50):
        engine.add(str(number), [number] * 70)
    chunks, _ = engine.step()
    assert min(chunk.num_tokens for chunk in chunks) >= 32
    assert sum(chunk.num_tokens for chunk in chunks) == 512


def test_admits_in_order_of_arrival():
    engine = Engine(num_sequences=2)
    for seq_id in "abcd":
        engine.add(seq_id, [5, 6], max_tokens=3)
    order = []
    while engine.scheduler.has_work:
        order += [chunk.seq.seq_id for chunk in engine.step()[0] if chunk.start == 0]
    assert order == list("abcd")


def test_counts_what_runs_and_waits():
    engine = Engine(num_sequences=1)
    engine.add("a", [1, 2, 3])
    engine.add("b", [1, 2, 3, 4])
    scheduler = engine.scheduler
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_waiting_tokens) == (0, 2, 7)
    engine.step()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_waiting_tokens) == (1, 1, 5)


# What is refused


def test_refuses_what_can_never_be_served_and_changes_nothing():
    engine = Engine(num_blocks=4, max_seq_len=20)
    with pytest.raises(InvalidRequest, match="at least one token"):
        engine.add("a", [])
    with pytest.raises(PromptTooLong):
        engine.add("a", [1] * 20)
    with pytest.raises(InvalidRequest, match="KV cache") as refused:
        engine.add("a", [1] * 17)
    assert not isinstance(refused.value, PromptTooLong)
    assert not engine.scheduler.has_work


def test_a_prompt_that_fills_the_pool_gets_one_token():
    engine = Engine(num_blocks=4)
    seq = engine.add("a", [1] * 16)
    engine.run()
    assert seq.num_generated_tokens == 1
    assert seq.finish_reason is FinishReason.LENGTH


def test_refuses_one_sequence_too_many_but_not_a_preempted_one():
    engine = Engine(num_waiting=2)
    engine.add("a", [1])
    engine.add("b", [1])
    with pytest.raises(QueueFull):
        engine.add("c", [1])
    engine.step()
    engine.add("c", [1])


def test_refuses_a_second_sequence_of_the_same_name_and_hashes_of_other_blocks():
    engine = Engine()
    engine.add("a", [1])
    with pytest.raises(ValueError, match="scheduled already"):
        engine.add("a", [1])
    with pytest.raises(ValueError, match="prefix hashes"):
        engine.scheduler.add(Sequence("b", [1], SamplingParams(), PrefixHasher(b"model", 8)))


@pytest.mark.parametrize("config", [(3, 4, 64, 1), (4, 0, 64, 1), (4, 4, 1, 1), (4, 4, 64, 0)])
def test_refuses_impossible_limits(config):
    with pytest.raises(ValueError):
        SchedulerConfig(*config)


# Reuse


def test_the_next_turn_reuses_prompt_and_reply():
    engine = Engine()
    first = engine.add("a", range(1, 12), max_tokens=6)
    engine.run()
    second = engine.add("b", [*first.token_ids, 7, 7, 7])
    engine.run()
    assert second.num_cached_tokens == (first.num_tokens - 1) // BLOCK * BLOCK


def test_a_shared_prefix_is_stored_once():
    engine = Engine()
    engine.add("a", [3] * 20)
    engine.step()
    engine.add("b", [3] * 20 + [4])
    engine.step()
    assert engine.pool.num_blocks - engine.pool.num_free_blocks == 5 + 2


def test_a_prompt_that_is_held_in_full_still_computes_its_last_token():
    engine = Engine()
    engine.add("a", [3] * 16)
    engine.step()
    again = engine.add("b", [3] * 16)
    chunks, _ = engine.step()
    assert again.num_cached_tokens == 12
    assert sizes(chunks)["b"] == 4


def test_a_prompt_whose_logits_are_wanted_is_computed_in_full():
    engine = Engine()
    engine.add("a", [3] * 16)
    engine.step()
    again = engine.add("b", [3] * 16, prompt_logprobs=1)
    chunks, _ = engine.step()
    assert again.num_cached_tokens == 0
    assert sizes(chunks)["b"] == 16


def test_tenants_share_nothing():
    engine = Engine()
    engine.add("a", [3] * 16)
    engine.run()
    other = Sequence("b", [3] * 16, SamplingParams(max_tokens=1), PrefixHasher(b"model", BLOCK, b"tenant"))
    engine.scheduler.add(other)
    engine.run()
    assert other.num_cached_tokens == 0


# Preemption


def test_preempts_the_latest_and_computes_the_same_tokens_in_the_end():
    engine = Engine(num_blocks=8, max_seq_len=30)
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15]]
    sequences = [engine.add(str(number), prompt) for number, prompt in enumerate(prompts)]
    engine.run()
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_preemptions == sum(seq.num_preemptions for seq in sequences)
    assert sequences[0].num_preemptions == 0
    for seq, prompt in zip(sequences, prompts, strict=True):
        assert seq.generated_token_ids == reply_to(prompt, None, 30)


def test_a_preempted_sequence_goes_on_before_those_that_never_ran():
    engine = Engine(num_blocks=6, num_sequences=2)
    engine.add("first", [1] * 4, max_tokens=16)
    second = engine.add("second", [2] * 4, max_tokens=16)
    engine.step()
    third = engine.add("third", [3] * 4, max_tokens=1)
    engine.run()
    assert (second.num_preemptions, third.num_preemptions) == (1, 0)
    assert second.arrival < third.arrival
    assert second.num_cached_tokens == 0


def test_prompts_that_do_not_fit_together_wait_instead_of_pushing_each_other_out():
    engine = Engine(num_blocks=12, budget=8, num_sequences=4)
    for number in range(4):
        engine.add(str(number), [number + 1] * 30, max_tokens=1)
    engine.run()
    assert engine.scheduler.num_preemptions == 0


def test_a_lone_sequence_waits_while_its_blocks_are_held_outside():
    engine = Engine(num_blocks=3)
    seq = engine.add("a", [1] * 8, max_tokens=3)
    engine.step()
    outside = engine.pool.allocate(1)
    assert engine.step([outside]) == ([], [])
    assert seq.num_computed_tokens == 8
    engine.pool.release(outside)
    engine.run()
    assert seq.generated_token_ids == reply_to([1] * 8, 3, 64)


def test_a_chunk_is_no_longer_than_there_are_blocks_for():
    engine = Engine(num_blocks=8, budget=9)
    growing = engine.add("growing", [1] * 4)
    engine.step()
    prompt = engine.add("prompt", [2] * 20)
    engine.step()
    outside = engine.pool.allocate(engine.pool.num_free_blocks - 1)
    chunks, _ = engine.step([outside])
    assert sizes(chunks) == {"growing": 1, "prompt": 4}
    engine.pool.release(outside)
    engine.run()
    assert growing.generated_token_ids == reply_to([1] * 4, None, 33)
    assert prompt.generated_token_ids == reply_to([2] * 20, None, 33)


# The end of a sequence


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_abort_frees_everything_at_any_point(num_steps):
    engine = Engine(budget=8)
    seq = engine.add("a", [3] * 20)
    for _ in range(num_steps):
        engine.step()
    assert engine.scheduler.abort("a")
    assert not engine.scheduler.abort("a")
    assert (seq.status, seq.finish_reason) == (SequenceStatus.FINISHED, FinishReason.ABORTED)
    assert engine.pool.num_free_blocks == engine.pool.num_blocks
    assert not engine.scheduler.has_work
    engine.scheduler.check_integrity()


def test_blocks_of_a_sequence_aborted_during_a_step_are_not_handed_out_before_its_end():
    engine = Engine(num_blocks=4)
    engine.add("a", [3] * 16)
    chunks = engine.scheduler.schedule()
    engine.scheduler.abort("a")
    engine.scheduler.check_integrity()
    with pytest.raises(OutOfBlocks):
        engine.scheduler.reserve([4], HASHER)
    assert engine.scheduler.commit(chunks, {"a": 1}) == []
    assert engine.pool.num_free_blocks == 4
    assert engine.pool.num_cached_blocks == 0


def test_a_failed_step_can_be_closed_and_repeated():
    engine = Engine()
    seq = engine.add("a", [1, 2, 3], max_tokens=4)
    engine.scheduler.schedule()
    with pytest.raises(AssertionError, match="still open"):
        engine.scheduler.schedule()
    assert engine.scheduler.commit((), {}) == []
    engine.run()
    assert seq.generated_token_ids == reply_to([1, 2, 3], 4, 64)


def test_a_sequence_that_ended_in_error_needs_no_token():
    engine = Engine()
    engine.add("good", [1, 2, 3])
    bad = engine.add("bad", [4, 5, 6])
    chunks = engine.scheduler.schedule()
    with pytest.raises(AssertionError, match="bad"):
        engine.scheduler.commit(chunks, {"good": 7})
    engine.scheduler.finish("bad", FinishReason.ERROR)
    engine.scheduler.commit(chunks, {"good": 7})
    engine.scheduler.check_integrity()
    assert bad.finish_reason is FinishReason.ERROR
    assert engine.scheduler.num_running == 1


def test_kept_blocks_stay_until_the_caller_releases_them():
    engine = Engine()
    seq = engine.add("a", [3] * 10, max_tokens=1, keeps_blocks=True)
    chunks = engine.scheduler.schedule()
    assert engine.scheduler.commit(chunks, engine.compute(chunks)) == [seq]
    engine.scheduler.check_integrity([seq.block_table])
    engine.cache.check(seq.block_table, digests([3] * 10))
    assert engine.pool.num_free_blocks == engine.pool.num_blocks - 3
    engine.pool.release(seq.block_table)
    engine.scheduler.check_integrity()


def test_an_aborted_sequence_keeps_nothing():
    engine = Engine()
    engine.add("a", [3] * 10, keeps_blocks=True)
    engine.step()
    engine.scheduler.abort("a")
    engine.scheduler.check_integrity()


def test_a_reply_goes_on_where_a_failed_replica_left_it():
    engine = Engine()
    whole = reply_to([5, 9], None, 64)
    assert len(whole) > 3
    seq = engine.sequence("a", [5, 9])
    for token_id in whole[:2]:
        seq.append(token_id)
    engine.scheduler.add(seq)
    engine.run()
    assert seq.generated_token_ids == whole


# KV from elsewhere


def test_a_reservation_shares_what_is_held_and_sets_aside_the_rest():
    engine = Engine()
    engine.add("a", [3] * 9)
    engine.step()
    reservation = engine.scheduler.reserve([3] * 8 + [4] * 5, HASHER)
    assert (reservation.num_cached_tokens, reservation.num_computed_tokens) == (8, 8)
    assert len(reservation.block_table) == 4
    engine.fill(reservation, 13)
    assert engine.pool.is_held(reservation.block_hashes[2])
    seq = engine.add("b", [3] * 8 + [4] * 5 + [6], reservation=reservation)
    chunks, _ = engine.step()
    assert sizes(chunks)["b"] == 1
    assert seq.num_cached_tokens == 8


@pytest.mark.parametrize("length", [8, 9, 11])
def test_a_prompt_that_arrived_in_full_computes_its_last_token_in_a_block_of_its_own(length):
    engine = Engine()
    reservation = engine.scheduler.reserve([3] * length, HASHER)
    engine.fill(reservation, length)
    seq = engine.add("a", [3] * length, reservation=reservation)
    engine.run()
    assert seq.generated_token_ids == reply_to([3] * length, None, 64)


def test_a_reservation_that_arrived_in_part_is_completed_here():
    engine = Engine()
    reservation = engine.scheduler.reserve([3] * 14, HASHER)
    engine.fill(reservation, 6)
    seq = engine.add("a", [3] * 14, reservation=reservation)
    assert sizes(engine.step()[0]) == {"a": 8}
    engine.run()
    assert seq.generated_token_ids == reply_to([3] * 14, None, 64)


def test_a_refused_reservation_changes_nothing():
    engine = Engine(num_blocks=4)
    engine.add("a", [3] * 8, max_tokens=1)
    engine.run()
    held = list(engine.pool.held_hashes())
    with pytest.raises(OutOfBlocks):
        engine.scheduler.reserve([3] * 8 + [4] * 9, HASHER)
    assert list(engine.pool.held_hashes()) == held
    engine.scheduler.check_integrity()


def test_reservations_leave_room_for_the_first_that_waits():
    engine = Engine(num_blocks=10, num_sequences=1)
    engine.add("a", [3] * 8)
    engine.step()
    engine.add("b", [4] * 16)
    engine.scheduler.reserve([5] * 8, HASHER)
    with pytest.raises(OutOfBlocks):
        engine.scheduler.reserve([6] * 8, HASHER)


def test_a_refused_sequence_leaves_its_reservation_open():
    engine = Engine(num_waiting=1)
    engine.add("a", [1])
    reservation = engine.scheduler.reserve([3] * 5, HASHER)
    with pytest.raises(QueueFull):
        engine.add("b", [3] * 5, reservation=reservation)
    engine.step()
    with pytest.raises(ValueError, match="does not begin"):
        engine.scheduler.add(engine.sequence("b", [4] * 5), reservation)
    assert reservation.is_open
    engine.scheduler.cancel(reservation)
    engine.scheduler.check_integrity()


def test_cancelling_twice_or_after_use_does_nothing():
    engine = Engine()
    one, two = (engine.scheduler.reserve([3] * 5, HASHER) for _ in range(2))
    engine.scheduler.cancel(one)
    engine.scheduler.cancel(one)
    engine.add("a", [3] * 6, reservation=two)
    engine.scheduler.cancel(two)
    engine.scheduler.check_integrity()
    with pytest.raises(AssertionError):
        engine.scheduler.arrived(one, 3)


def test_a_transfer_given_up_leaves_only_the_doubtful_blocks_in_quarantine():
    engine = Engine(num_blocks=4)
    reservation = engine.scheduler.reserve([3] * 15, HASHER)
    engine.fill(reservation, 9)
    with pytest.raises(ValueError, match="verified"):
        engine.scheduler.quarantine(reservation, 8)
    doubtful = engine.scheduler.quarantine(reservation, 9)
    assert len(doubtful) == engine.pool.num_quarantined_blocks == 2
    assert engine.pool.num_cached_blocks == 2
    seq = engine.add("a", [3] * 10, max_tokens=1)
    assert engine.step() == ([], [])
    engine.pool.readmit(doubtful)
    engine.run()
    assert seq.num_cached_tokens == 8


@pytest.mark.parametrize("num_tokens", [3, 6])
def test_arrival_stays_between_what_was_there_and_what_was_reserved(num_tokens):
    engine = Engine()
    reservation = engine.scheduler.reserve([3] * 5, HASHER)
    engine.fill(reservation, 4)
    with pytest.raises(ValueError, match="arrived"):
        engine.scheduler.arrived(reservation, num_tokens)


def test_a_reservation_is_of_no_use_to_a_prompt_whose_logits_are_wanted():
    engine = Engine()
    reservation = engine.scheduler.reserve([3] * 5, HASHER)
    with pytest.raises(ValueError, match="computes every token"):
        engine.add("a", [3] * 5, reservation=reservation, prompt_logprobs=1)


def test_waiting_sequences_give_up_reserved_blocks_to_those_before_them():
    engine = Engine(num_blocks=6, num_sequences=1)
    first = engine.add("first", [1] * 8, max_tokens=12)
    engine.step()
    reservation = engine.scheduler.reserve([2] * 8, HASHER)
    engine.fill(reservation, 8)
    second = engine.add("second", [2] * 8 + [5], reservation=reservation)
    engine.run()
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert first.generated_token_ids == reply_to([1] * 8, 12, 64)
    assert second.generated_token_ids == reply_to([2] * 8 + [5], None, 25)


def test_the_first_that_waits_takes_reserved_blocks_when_nobody_runs():
    engine = Engine(num_blocks=6)
    mine, other = engine.scheduler.reserve([1] * 8, HASHER), engine.scheduler.reserve([2] * 8, HASHER)
    engine.fill(mine, 8)
    engine.fill(other, 8)
    first = engine.add("first", [1] * 20, max_tokens=1, reservation=mine)
    second = engine.add("second", [2] * 8 + [5], max_tokens=1, reservation=other)
    chunks, _ = engine.step()
    assert sizes(chunks) == {"first": 12}
    engine.run()
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)


def test_the_first_that_waits_keeps_its_own_blocks():
    engine = Engine(num_blocks=6)
    reservation = engine.scheduler.reserve([1] * 8, HASHER)
    engine.fill(reservation, 8)
    seq = engine.add("a", [1] * 20, max_tokens=1, reservation=reservation)
    outside = engine.pool.allocate(4)
    assert engine.step([outside]) == ([], [])
    assert (seq.num_computed_tokens, seq.num_preemptions) == (8, 0)
    engine.pool.release(outside)
    engine.run()
    assert seq.generated_token_ids == reply_to([1] * 20, 1, 64)


# Any order of events

# Few different prompts, many of them whole blocks long, so that they share blocks in every way there is.
PROMPTS = st.builds(
    lambda base, length, tail: [base] * length + tail,
    st.integers(1, 2),
    st.sampled_from([0, 4, 8, 8, 12, 5, 15]),
    st.sampled_from([[1], [2], [1, 1, 1, 1], [2, 2, 2, 2], [1, 2, 3]]),
)


@given(
    prompts=st.lists(PROMPTS, min_size=2, max_size=8),
    num_blocks=st.integers(6, 12),
    budget=st.integers(4, 12),
    steps_between=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_pressure_changes_no_token_and_no_order(prompts, num_blocks, budget, steps_between):
    engine = Engine(num_blocks, budget, num_sequences=4, max_seq_len=24)
    sequences = []
    for number, prompt in enumerate(prompts):
        sequences.append(engine.add(str(number), prompt))
        for _ in range(steps_between):
            engine.step()
    engine.run(limit=len(prompts) * 25)
    for seq, prompt in zip(sequences, prompts, strict=True):
        assert seq.generated_token_ids == reply_to(prompt, None, 24)
    assert sequences[0].num_preemptions == 0
    assert engine.pool.num_free_blocks == num_blocks


class SchedulerMachine(RuleBasedStateMachine):
    """Sequences, reservations, aborts and transfers in random order on a pool that is far too small.

    Checked throughout: references, content of every slot that is read, who writes where. At the end: everything
    finishes within a bounded number of steps, with the tokens that the model alone would give, and nothing is left.
    """

    reservations = Bundle("reservations")
    NUM_BLOCKS, MAX_SEQ_LEN = 7, 22

    def __init__(self):
        super().__init__()
        self.engine = Engine(self.NUM_BLOCKS, budget=9, num_sequences=3, max_seq_len=self.MAX_SEQ_LEN, num_waiting=5)
        self.scheduler, self.pool = self.engine.scheduler, self.engine.pool
        self.live: dict[str, Sequence] = {}
        self.kept: list[Sequence] = []
        self.quarantined: list[int] = []
        self.open_step: list[Chunk] = []
        self.tables_of_step: list[list[int]] = []
        self.garbage = random.Random(0)
        self.num_added = 0

    def expected_reply(self, seq):
        return reply_to(seq.token_ids[: seq.num_prompt_tokens], seq.sampling.max_tokens, self.MAX_SEQ_LEN)

    def settle(self, finished):
        for seq in finished:
            del self.live[seq.seq_id]
            assert seq.generated_token_ids == self.expected_reply(seq)
            if seq.keeps_blocks:
                self.engine.cache.check(seq.block_table, digests(seq.token_ids[:-1]))
                self.kept.append(seq)

    def scribble(self):
        """Transfers that are under way or were given up write whatever they like."""
        for block_id in self.quarantined:
            self.engine.cache.slots[block_id, self.garbage.randrange(BLOCK)] = self.garbage.random()

    def add_sequence(self, prompt, reservation=None, **options):
        self.num_added += 1
        seq_id = str(self.num_added)
        try:
            self.live[seq_id] = self.engine.add(seq_id, prompt, reservation=reservation, **options)
        except QueueFull:
            assert self.scheduler.num_waiting >= 5
            return False
        return True

    @rule(
        prompt=PROMPTS,
        max_tokens=st.sampled_from([None, None, 1, 9]),
        keeps_blocks=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(self, prompt, max_tokens, keeps_blocks, prompt_logprobs):
        self.add_sequence(prompt, max_tokens=max_tokens, keeps_blocks=keeps_blocks, prompt_logprobs=prompt_logprobs)

    @precondition(lambda self: not self.open_step)
    @rule()
    def open_a_step(self):
        self.open_step = self.scheduler.schedule()
        self.tables_of_step = [list(chunk.seq.block_table) for chunk in self.open_step]

    @precondition(lambda self: self.open_step)
    @rule(fails=st.sampled_from([False, False, False, True]))
    def close_the_step(self, fails):
        chunks, self.open_step = self.open_step, []
        for chunk, table in zip(chunks, self.tables_of_step, strict=True):
            if chunk.seq.is_finished:  # the runner does not know: it writes where it was told to
                for position in range(chunk.start, chunk.start + chunk.num_tokens):
                    self.engine.cache.slots[table[position // BLOCK], position % BLOCK] = None
        if fails:
            assert self.scheduler.commit((), {}) == []
            return
        sampled = self.engine.compute([chunk for chunk in chunks if not chunk.seq.is_finished])
        self.settle(self.scheduler.commit(chunks, sampled))

    @precondition(lambda self: not self.open_step)
    @rule(num_steps=st.sampled_from([1, 4, 14]))
    def take_steps(self, num_steps):
        for _ in range(num_steps):
            self.scribble()
            chunks = self.scheduler.schedule()
            self.settle(self.scheduler.commit(chunks, self.engine.compute(chunks)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORTED, FinishReason.STOP]))
    def end_from_outside(self, data, reason):
        seq = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        assert self.scheduler.finish(seq.seq_id, reason)
        assert seq.generated_token_ids == self.expected_reply(seq)[: seq.num_generated_tokens]
        if seq.keeps_blocks and reason is FinishReason.STOP:
            self.kept.append(seq)
        else:
            assert seq.block_table == []

    @precondition(lambda self: self.kept and not self.open_step)
    @rule()
    def release_kept_blocks(self):
        self.pool.release(self.kept.pop(0).block_table)

    @rule(target=reservations, prompt=PROMPTS)
    def reserve(self, prompt):
        num_free = self.pool.num_free_blocks
        try:
            reservation = self.scheduler.reserve(prompt, HASHER)
        except OutOfBlocks:
            assert self.pool.num_free_blocks == num_free
            return multiple()
        self.engine.cache.check(reservation.block_table, digests(prompt[: reservation.num_cached_tokens]))
        return reservation

    @rule(reservation=reservations, data=st.data())
    def arrive(self, reservation, data):
        num_before, num_tokens = reservation.num_computed_tokens, len(reservation.token_ids)
        self.engine.cache.write(reservation.block_table, num_before, [None] * (num_tokens - num_before))
        self.engine.fill(reservation, data.draw(st.integers(num_before, num_tokens)))

    @rule(reservation=consumes(reservations))
    def cancel(self, reservation):
        self.scheduler.cancel(reservation)

    @rule(reservation=consumes(reservations), skipped=st.integers(0, 5))
    def give_up(self, reservation, skipped):
        self.quarantined += self.scheduler.quarantine(reservation, reservation.num_computed_tokens + skipped)

    @precondition(lambda self: self.quarantined)
    @rule()
    def readmit(self):
        self.scribble()
        self.pool.readmit(self.quarantined)
        self.quarantined = []

    @rule(reservation=consumes(reservations), tail=st.lists(st.integers(1, 3), max_size=2))
    def use(self, reservation, tail):
        if not self.add_sequence(reservation.token_ids + tail, reservation):
            self.scheduler.cancel(reservation)

    @rule(prompt=PROMPTS)
    def evict_first(self, prompt):
        self.pool.evict_first(HASHER.hashes(prompt))

    @invariant()
    def books_agree(self):
        self.scheduler.check_integrity(seq.block_table for seq in self.kept)
        if self.open_step:
            blocks = {block_id for table in self.tables_of_step for block_id in table}
            assert all(self.pool._num_references[block_id] for block_id in blocks), "freed, but the runner writes to it"
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)
        assert self.scheduler.num_running <= 3
        for hash_, block_id in self.pool._block_of.items():
            assert self.pool.match([hash_]) == [block_id]

    def teardown(self):
        if self.open_step:
            self.close_the_step(fails=False)
        for reservation in list(self.scheduler._reservations._open):
            self.scheduler.cancel(reservation)
        self.pool.readmit(self.quarantined)
        while self.kept:
            self.release_kept_blocks()
        # The earliest goes on in every step, so each needs at most as many steps as it has tokens.
        for _ in range(len(self.live) * (self.MAX_SEQ_LEN + 1)):
            if not self.live:
                break
            chunks = self.scheduler.schedule()
            assert chunks
            self.settle(self.scheduler.commit(chunks, self.engine.compute(chunks)))
            while self.kept:
                self.release_kept_blocks()
        assert not self.live
        assert not self.scheduler.has_work
        self.scheduler.check_integrity()
        assert self.pool.num_free_blocks == self.NUM_BLOCKS


SchedulerMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
