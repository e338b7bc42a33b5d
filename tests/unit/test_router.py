"""Where turns go: held prefixes against load, holders that leave or fail, the baselines, and the reasons given."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Unavailable
from services.common.messages import RoutingReason
from services.common.settings import RoutingSettings
from services.gateway.router import RoutingQuestion, choose
from services.sessions.base import Holder
from services.sessions.registry import ReplicaRecord, Role

COST = RoutingSettings()
HASH = RoutingSettings(policy="consistent_hash")
RANDOM = RoutingSettings(policy="random")


def replica(name: str, **changes: Any) -> ReplicaRecord:
    record = ReplicaRecord(
        Role.DECODE,
        name,
        incarnation=f"{name}-1",
        started_at_s=0.0,
        model_fingerprint="m",
        layout_fingerprint="l",
        block_size=16,
        num_blocks=1000,
        num_free_blocks=1000,
        prefill_tokens_per_s=1000.0,
        decode_tokens_per_s=100.0,
        transfer_bytes_per_s=1e9,
    )
    return dataclasses.replace(record, **changes)


def holder(name: str, num_tokens: int, incarnation: str = "") -> Holder:
    return Holder(name, incarnation or f"{name}-1", num_tokens)


def ask(num_prompt_tokens: int = 1000, *holders: Holder, **changes: Any) -> RoutingQuestion:
    return RoutingQuestion("digest", num_prompt_tokens, holders, kv_token_bytes=1000, **changes)


def test_goes_to_the_holder_of_the_history() -> None:
    route = choose(ask(1000, holder("b", 900)), [replica("a"), replica("b"), replica("c")], COST)
    assert route.decision.replica == "b"
    assert route.decision.reason is RoutingReason.HELD_PREFIX
    assert route.num_cached_tokens == 900
    assert [candidate.num_held_tokens for candidate in route.decision.candidates] == [0, 900, 0]


def test_a_new_session_goes_where_it_pushes_nobody_out() -> None:
    full = replica("a", num_session_blocks=980)
    busier = replica("b", num_running=2, num_waiting_tokens=200)
    assert choose(ask(1000), [full, busier], COST).decision.replica == "b"
    assert choose(ask(1000), [full, replica("b", num_waiting_tokens=900)], COST).decision.replica == "a"


def test_blocks_of_idle_sessions_cost_their_own_session_nothing() -> None:
    full = [replica(name, num_session_blocks=1000) for name in "ab"]
    route = choose(ask(1000, holder("b", 992)), full, COST)
    assert route.decision.reason is RoutingReason.HELD_PREFIX
    costs = {each.replica: each.cost_ms for each in route.decision.candidates}
    assert costs["b"] == pytest.approx(8 + 16)  # 8 tokens to compute, and a block of somebody else's for them
    assert costs["a"] > 1000


def test_the_heir_of_a_replica_that_stops_is_a_holder_in_its_place() -> None:
    leaving = replica("a", is_draining=True)
    heir = replica("b", inherits=("z-1", "a-1"))
    for records in ([leaving, heir, replica("c")], [heir, replica("c")]):
        route = choose(ask(1000, holder("a", 900)), records, COST)
        assert route.decision.replica == "b"
        assert route.decision.reason is RoutingReason.HELD_PREFIX
        assert route.live_holders[0].holder == holder("b", 900)
        assert len(route.live_holders) == 1


def test_of_heirs_the_last_one_counts() -> None:
    first = replica("b", inherits=("a-1",), is_draining=True)
    last = replica("c", inherits=("a-1", "b-1"))
    for records in ([first, last], [last, first]):
        assert choose(ask(1000, holder("a", 900)), records, COST).live_holders[0].holder == holder("c", 900)


def test_a_session_that_was_held_twice_is_held_once_by_the_heir() -> None:
    heir = replica("b", inherits=("a-1",))
    route = choose(ask(1000, holder("a", 900), holder("b", 400)), [heir], COST)
    assert [each.holder for each in route.live_holders] == [holder("b", 900)]


def test_the_longest_of_several_prefixes_wins() -> None:
    question = ask(1000, holder("a", 300), holder("b", 900))
    route = choose(question, [replica("a"), replica("b")], COST)
    assert route.decision.replica == "b"
    assert [each.holder.replica_id for each in route.live_holders] == ["b", "a"]


def test_leaves_an_overloaded_holder_and_says_so() -> None:
    records = [replica("a"), replica("b", num_waiting_tokens=50_000)]
    route = choose(ask(1000, holder("b", 900)), records, COST)
    assert (route.decision.replica, route.decision.reason) == ("a", RoutingReason.HOLDER_OVERLOADED)
    assert "b holds 900 of 1000 tokens" in route.decision.detail
    assert route.num_cached_tokens == 900  # to be fetched


def test_stays_with_a_moderately_busy_holder() -> None:
    records = [replica("a"), replica("b", num_waiting_tokens=3, num_running=0)]
    assert choose(ask(1000, holder("b", 900)), records, COST).decision.replica == "b"


def test_stays_for_a_gain_that_is_small_against_the_cost_of_staying() -> None:
    records = [replica("a"), replica("b", num_waiting_tokens=50)]
    assert choose(ask(1000, holder("b", 900)), records, COST).decision.replica == "b"
    records = [replica("a"), replica("b", num_waiting_tokens=400)]
    assert choose(ask(1000, holder("b", 900)), records, COST).decision.replica == "a"


def test_history_is_recomputed_where_fetching_costs_more_than_queueing() -> None:
    slow = {"transfer_bytes_per_s": 1e5}
    records = [replica("a", **slow), replica("b", num_waiting_tokens=3000, **slow)]
    assert choose(ask(1000, holder("b", 900)), records, COST).decision.replica == "b"
    fast = [replica("a"), replica("b", num_waiting_tokens=3000)]
    assert choose(ask(1000, holder("b", 900)), fast, COST).decision.replica == "a"


@pytest.mark.parametrize("records", [[replica("a")], [replica("a"), replica("b", incarnation="b-2")]])
def test_holder_that_left_or_restarted_holds_nothing(records: list[ReplicaRecord]) -> None:
    route = choose(ask(1000, holder("b", 900)), records, COST)
    assert route.decision.reason is RoutingReason.HOLDER_GONE
    assert route.num_cached_tokens == 0
    assert route.live_holders == ()


def test_without_a_holder_the_least_loaded_replica_takes_it() -> None:
    records = [replica("a", num_waiting_tokens=500), replica("b"), replica("c", num_running=30)]
    route = choose(ask(), records, COST)
    assert (route.decision.replica, route.decision.reason) == ("b", RoutingReason.NO_HOLDER)


def test_turns_sent_since_the_last_heartbeat_count_as_load() -> None:
    records = [replica("a"), replica("b")]
    assert choose(ask(), records, COST).decision.replica == "a"
    assert choose(ask(pending_tokens={"a": 1000}), records, COST).decision.replica == "b"


def test_a_full_pool_repels() -> None:
    records = [replica("a", num_free_blocks=0), replica("b")]
    assert choose(ask(), records, COST).decision.replica == "b"


def test_draining_and_excluded_replicas_are_listed_but_not_chosen() -> None:
    records = [replica("a"), replica("b", is_draining=True), replica("c")]
    route = choose(ask(1000, holder("a", 900), excluded={"a": "was lost"}), records, COST)
    assert (route.decision.replica, route.decision.reason) == ("c", RoutingReason.HOLDER_OVERLOADED)
    assert [candidate.note for candidate in route.decision.candidates] == ["was lost", "is draining", ""]


@pytest.mark.parametrize("settings", [COST, HASH, RANDOM])
def test_nobody_to_take_it_is_unavailable(settings: RoutingSettings) -> None:
    with pytest.raises(Unavailable):
        choose(ask(), [], settings)
    with pytest.raises(Unavailable):
        choose(ask(), [replica("a", is_draining=True)], settings)


def test_hash_is_stable_and_moves_only_the_sessions_of_a_replica_that_leaves() -> None:
    records = [replica(name) for name in "abcd"]

    def place(session: int, among: list[ReplicaRecord]) -> str:
        return choose(RoutingQuestion(f"s{session}", 10), among, HASH).decision.replica

    before = [place(session, records) for session in range(400)]
    after = [place(session, records[:-1]) for session in range(400)]
    assert all(old == new for old, new in zip(before, after, strict=True) if old != "d")
    assert min(Counter(before).values()) > 60


def test_random_policy_draws_all() -> None:
    rng = random.Random(7)
    drawn = {choose(ask(), [replica("a"), replica("b")], RANDOM, rng).decision.replica for _ in range(40)}
    assert drawn == {"a", "b"}


def test_replicas_that_have_measured_nothing_are_compared_all_the_same() -> None:
    blank = {"prefill_tokens_per_s": None, "decode_tokens_per_s": None, "transfer_bytes_per_s": None}
    route = choose(ask(1000, holder("b", 900)), [replica("a", **blank), replica("b", **blank)], COST)
    assert route.decision.replica == "b"


def test_a_slow_last_prompt_does_not_drive_a_session_from_its_holder() -> None:
    records = [replica("a", prefill_tokens_per_s=None), replica("b", prefill_tokens_per_s=50.0)]
    assert choose(ask(1000, holder("b", 900)), records, COST).decision.replica == "b"


@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.integers(0, 1200), st.integers(0, 1000), st.integers(0, 40)),
        min_size=1,
        max_size=5,
    )
)
def test_the_choice_is_never_dearer_than_another_candidate(loads: list[tuple[int, int, int, int]]) -> None:
    records = [
        replica(f"r{i}", num_waiting_tokens=waiting, num_free_blocks=free, num_running=running)
        for i, (waiting, _, free, running) in enumerate(loads)
    ]
    holders = tuple(holder(f"r{i}", held) for i, (_, held, _, _) in enumerate(loads) if held)
    decision = choose(ask(1000, *holders), records, COST).decision
    costs = {candidate.replica: candidate.cost_ms for candidate in decision.candidates}
    assert costs[decision.replica] == min(costs.values())
    assert all(candidate.num_held_tokens < 1000 for candidate in decision.candidates)
