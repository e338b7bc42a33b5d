"""How many replicas there should be: bounds, steadiness, monotony, ratio, and sessions that are kept."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidSettings
from services.common.settings import AutoscalingSettings, ReplicaBounds, Settings
from services.common.telemetry import configure_logging
from services.scaling.policy import Decision, ScalingPolicy
from services.scaling.ratio import Pair, in_proportion, prefill_range
from services.scaling.snapshot import HelperLoad, Kind, Snapshot, WorkerLoad

ONE_TO_FOUR = ReplicaBounds(min=1, max=4)
SETTINGS = AutoscalingSettings(
    enabled=True,
    gateway=ONE_TO_FOUR,
    tokenizer=ONE_TO_FOUR,
    prefill=ONE_TO_FOUR,
    decode=ONE_TO_FOUR,
    target_queue_s=1.0,
    target_inter_token_s=0.05,
    down_window_s=30.0,
    session_keep_s=600.0,
)
RATE = 1000.0


def worker(name: str = "a", **changes: object) -> WorkerLoad:
    idle = WorkerLoad(
        replica_id=name,
        num_blocks=1000,
        num_free_blocks=1000,
        block_size=16,
        block_bytes=1 << 16,
        prefill_tokens_per_s=RATE,
        decode_tokens_per_s=200.0,
        transfer_bytes_per_s=1e9,
    )
    return dataclasses.replace(idle, **changes)  # type: ignore[arg-type]


def spread(num_replicas: int, *, waiting: int = 0, running: int = 0, used: int = 0) -> list[WorkerLoad]:
    """A load that so many replicas share."""
    return [
        worker(
            f"r{index}",
            num_waiting_tokens=waiting // num_replicas,
            num_running=running // num_replicas,
            num_free_blocks=max(1000 - used // num_replicas, 0),
        )
        for index in range(num_replicas)
    ]


def at(now_s: float, prefill: Sequence[WorkerLoad], decode: Sequence[WorkerLoad], **targets: int) -> Snapshot:
    numbers = {Kind.PREFILL: len(prefill), Kind.DECODE: len(decode)} | {Kind(name): n for name, n in targets.items()}
    return Snapshot(now_s, numbers, prefill, decode)


def numbers(decisions: dict[Kind, Decision]) -> tuple[int, int]:
    return decisions[Kind.PREFILL].target, decisions[Kind.DECODE].target


# Up.


def test_burst_in_the_queue_is_answered_at_once_by_as_many_as_it_takes() -> None:
    policy = ScalingPolicy(SETTINGS)
    decisions = policy.decide(at(0.0, spread(1, waiting=2600), spread(1)))
    assert decisions[Kind.PREFILL].target == 3
    assert decisions[Kind.PREFILL].reason.startswith("more: queue needs 2.60")
    assert decisions[Kind.DECODE].target == 1


def test_steady_prompts_need_replicas_though_nothing_waits() -> None:
    snapshot = dataclasses.replace(at(0.0, spread(2), spread(1)), prefill_demand_tokens_per_s=1900.0)
    assert ScalingPolicy(SETTINGS).decide(snapshot)[Kind.PREFILL].target == 3


def test_waiting_prompts_count_by_decodes_speed_until_a_prefill_replica_has_measured() -> None:
    unmeasured = [worker("p", prefill_tokens_per_s=None, num_waiting_tokens=1500)]
    assert ScalingPolicy(SETTINGS).decide(at(0.0, unmeasured, spread(1)))[Kind.PREFILL].target == 2
    nobody = [worker("d", prefill_tokens_per_s=None)]
    assert ScalingPolicy(SETTINGS).decide(at(0.0, unmeasured, nobody))[Kind.PREFILL].target == 1


def test_blocks_in_use_need_decode_replicas() -> None:
    decisions = ScalingPolicy(SETTINGS).decide(at(0.0, spread(1), spread(1, used=900)))
    assert decisions[Kind.DECODE].target == 2
    assert "kv" in decisions[Kind.DECODE].reason


def test_turns_that_were_refused_need_decode_replicas_beyond_what_a_full_pool_shows() -> None:
    full = at(0.0, spread(1), spread(1, used=1000))
    assert ScalingPolicy(SETTINGS).decide(full)[Kind.DECODE].target == 2
    burst = dataclasses.replace(full, num_refused_blocks=1400)
    assert ScalingPolicy(SETTINGS).decide(burst)[Kind.DECODE].target == 3


def test_sequences_beyond_the_inter_token_target_need_decode_replicas() -> None:
    decisions = ScalingPolicy(SETTINGS).decide(at(0.0, spread(1), spread(1, running=25)))
    assert decisions[Kind.DECODE].target == 3  # 200 tokens/s and 50 ms: ten sequences each
    assert "inter_token" in decisions[Kind.DECODE].reason


@pytest.mark.parametrize(("cpus", "calls", "expected"), [(0.1, 1, 1), (1.5, 1, 3), (0.1, 600, 3)])
@pytest.mark.parametrize("kind", [Kind.GATEWAY, Kind.TOKENIZER])
def test_helpers_follow_cpu_and_calls(kind: Kind, cpus: float, calls: float, expected: int) -> None:
    load = {kind.value: [HelperLoad(cpus, calls)]}
    snapshot = Snapshot(0.0, {kind: 1}, **load)  # type: ignore[arg-type]
    assert ScalingPolicy(SETTINGS).decide(snapshot)[kind].target == expected


def test_up_window_lets_a_spike_pass() -> None:
    policy = ScalingPolicy(SETTINGS.model_copy(update={"up_window_s": 5.0}))
    targets = [
        policy.decide(at(float(second), spread(1, waiting=0 if second == 7 else 1900), spread(1)))[Kind.PREFILL].target
        for second in range(14)
    ]
    assert targets[:5] == [1] * 5
    assert targets[5] == 2  # five seconds of it
    assert targets[7:12] == [1] * 5
    assert targets[12:] == [1, 2]


def test_one_slow_sequence_is_not_made_faster_by_another_replica() -> None:
    slow = [worker(num_running=1, decode_tokens_per_s=5.0)]
    assert ScalingPolicy(SETTINGS).decide(at(0.0, spread(1), slow))[Kind.DECODE].target == 1
    slow = [worker(num_running=2, decode_tokens_per_s=5.0)]
    assert ScalingPolicy(SETTINGS).decide(at(0.0, spread(1), slow))[Kind.DECODE].target == 2


def test_a_replica_that_ran_alone_and_slowly_says_nothing_of_what_one_can_do() -> None:
    replicas = [worker("a", num_running=9), worker("b", num_running=1, decode_tokens_per_s=20.0)]
    assert ScalingPolicy(SETTINGS).decide(at(0.0, spread(1), replicas))[Kind.DECODE].target == 2


def test_what_a_draining_replica_still_runs_asks_for_no_other() -> None:
    draining = worker("b", num_running=50, num_free_blocks=0, is_draining=True)
    snapshot = Snapshot(0.0, {Kind.DECODE: 1}, decode=[worker(), draining])
    assert ScalingPolicy(SETTINGS).decide(snapshot)[Kind.DECODE].target == 1


# Down.


def test_goes_down_only_after_a_whole_window_of_less() -> None:
    policy = ScalingPolicy(SETTINGS)
    assert policy.decide(at(0.0, spread(1, waiting=3500), spread(1)))[Kind.PREFILL].target == 4
    targets = [policy.decide(at(float(second), spread(4), spread(1)))[Kind.PREFILL].target for second in range(1, 32)]
    assert targets == [4] * 30 + [1]


def test_what_a_window_has_seen_keeps_replicas() -> None:
    policy = ScalingPolicy(SETTINGS)
    load = [0] * 20 + [2500] + [0] * 40
    targets = [
        policy.decide(at(float(second), spread(4, waiting=waiting), spread(1)))[Kind.PREFILL].target
        for second, waiting in enumerate(load)
    ]
    assert targets[:51] == [4] * 51  # the burst at 20 s needs four until 50 s
    assert targets[51] == 1


def test_decode_gives_up_one_replica_at_a_time() -> None:
    policy, current = ScalingPolicy(SETTINGS), 4
    seen = []
    for second in range(100):
        current = policy.decide(at(float(second), spread(1), spread(current)))[Kind.DECODE].target
        seen.append(current)
    assert seen[29:32] == [4, 3, 3]
    assert sorted(set(seen), reverse=True) == [4, 3, 2, 1]
    assert [seen.index(number) for number in (3, 2, 1)] == [30, 60, 90]


def test_a_policy_that_has_just_begun_gives_nothing_up() -> None:
    fresh = ScalingPolicy(SETTINGS)
    assert fresh.decide(at(1000.0, spread(4), spread(4)))[Kind.PREFILL].target == 4


# Sessions.


def settled(decode: Sequence[WorkerLoad], settings: AutoscalingSettings = SETTINGS) -> Decision:
    """What a whole window of this leads to."""
    policy = ScalingPolicy(settings)
    for second in range(31):
        decision = policy.decide(at(float(second), spread(1), decode))[Kind.DECODE]
    return decision


def test_sessions_that_another_replica_has_room_for_let_a_replica_go() -> None:
    decision = settled([worker("a", num_session_blocks=300, num_idle_sessions=5), worker("b")])
    assert decision.target == 1
    assert decision.inputs["leaving"]["num_tokens"] == 4800  # type: ignore[index]


def test_sessions_that_fit_nowhere_keep_the_replica() -> None:
    full = [worker(name, num_session_blocks=700, num_idle_sessions=5) for name in "ab"]
    decision = settled(full)
    assert decision.target == 2
    assert "no other replica has room for 11200 tokens" in decision.reason


def test_handing_over_that_costs_more_than_computing_again_keeps_the_replica() -> None:
    slow = [worker(name, num_session_blocks=100, num_idle_sessions=5, transfer_bytes_per_s=1e6) for name in "ab"]
    decision = settled(slow)
    assert decision.target == 2
    assert "to hand over takes" in decision.reason


def test_sessions_that_have_become_idle_for_too_long_no_longer_keep_it() -> None:
    assert settled([worker("a", num_free_blocks=1000), worker("b")]).target == 1


def test_a_draining_replica_offers_no_room() -> None:
    others = [worker("b", num_session_blocks=790, num_idle_sessions=9), worker("c", is_draining=True)]
    decision = settled([worker("a", num_session_blocks=300, num_idle_sessions=3), *others])
    assert decision.target == 3


# Properties.

loads = st.builds(
    dict,
    waiting=st.integers(0, 20_000),
    running=st.integers(0, 300),
    used=st.integers(0, 5_000),
)
ratios = st.sampled_from([(0.0, 8.0), (0.5, 2.0), (1.0, 1.0), (0.25, 0.5), (1.5, 3.0)])


def with_ratio(ratio: tuple[float, float]) -> AutoscalingSettings:
    bounds = ReplicaBounds(min=1, max=6)
    return AutoscalingSettings(
        enabled=True,
        prefill=bounds,
        decode=bounds,
        down_window_s=5.0,
        min_prefill_per_decode=ratio[0],
        max_prefill_per_decode=ratio[1],
    )


def is_in_ratio(pair: Pair, settings: AutoscalingSettings) -> bool:
    fewest, most = prefill_range(pair.decode, settings)
    return fewest <= pair.prefill <= most


@given(st.lists(loads, min_size=1, max_size=40), ratios)
def test_bounds_and_ratio_hold_whatever_the_load_does(
    history: list[dict[str, int]], ratio: tuple[float, float]
) -> None:
    settings = with_ratio(ratio)
    policy, prefill, decode = ScalingPolicy(settings), 1, 1
    for second, load in enumerate(history):
        snapshot = at(float(second), spread(prefill, waiting=load["waiting"]), spread(decode, **load))
        prefill, decode = numbers(dict(policy.decide(snapshot)))
        assert 1 <= prefill <= 6
        assert 1 <= decode <= 6
        assert is_in_ratio(Pair(prefill, decode), settings)


@given(loads, st.integers(1, 6), st.integers(1, 6), ratios)
def test_constant_load_settles_and_stays(
    load: dict[str, int], prefill: int, decode: int, ratio: tuple[float, float]
) -> None:
    settings = with_ratio(ratio)
    policy, seen = ScalingPolicy(settings), []
    for second in range(80):
        snapshot = at(float(second), spread(prefill, waiting=load["waiting"]), spread(decode, **load))
        prefill, decode = numbers(dict(policy.decide(snapshot)))
        seen.append((prefill, decode))
    for series in zip(*seen, strict=True):
        steps = [b - a for a, b in itertools.pairwise(series) if a != b]
        # After the first moment it goes one way only, and then stands still.
        assert all(step < 0 for step in steps[1:]) or all(step > 0 for step in steps[1:])
    assert seen[-30:] == [seen[-1]] * 30


@given(loads, loads, st.integers(1, 6), st.integers(1, 6), ratios)
def test_more_load_never_gets_fewer_replicas(
    load: dict[str, int], extra: dict[str, int], prefill: int, decode: int, ratio: tuple[float, float]
) -> None:
    settings = with_ratio(ratio)
    heavier = {name: load[name] + extra[name] for name in load}
    results = []
    for each in (load, heavier):
        snapshot = at(0.0, spread(prefill, waiting=each["waiting"]), spread(decode, **each))
        results.append(numbers(dict(ScalingPolicy(settings).decide(snapshot))))
    assert results[0][0] <= results[1][0]
    assert results[0][1] <= results[1][1]


@given(st.integers(1, 6), st.integers(1, 6), ratios)
def test_ratio_gives_the_least_pair_that_has_what_is_wanted(
    prefill: int, decode: int, ratio: tuple[float, float]
) -> None:
    settings = with_ratio(ratio)
    pair = in_proportion(Pair(prefill, decode), settings)
    possible = [Pair(p, d) for p in range(1, 7) for d in range(1, 7) if is_in_ratio(Pair(p, d), settings)]
    enough = [each for each in possible if each.prefill >= prefill and each.decode >= decode]
    assert pair in possible
    if enough:
        assert pair in enough
        assert pair.decode == min(each.decode for each in enough)
    else:
        assert pair == max(possible, key=lambda each: (each.decode, each.prefill))


# Settings and logs.


def test_settings_that_cannot_be_kept_are_refused() -> None:
    impossible = {"prefill": {"max": 1}, "decode": {"min": 4, "max": 4}, "min_prefill_per_decode": 1.0}
    with pytest.raises(InvalidSettings, match="ratio"):
        Settings.from_mapping({"autoscaling": impossible}, {})
    with pytest.raises(InvalidSettings, match="min must not exceed max"):
        Settings.from_mapping({"autoscaling": {"decode": {"min": 3, "max": 2}}}, {})
    outside = {"decode": {"num_replicas": 2}, "autoscaling": {"enabled": True}}
    with pytest.raises(InvalidSettings, match=r"within autoscaling\.decode"):
        Settings.from_mapping(outside, {})


def test_each_new_decision_is_a_json_line_with_its_inputs() -> None:
    stream = io.StringIO()
    configure_logging("INFO", "scaling", stream=stream)
    policy = ScalingPolicy(SETTINGS)
    for second in range(3):
        policy.decide(at(float(second), spread(1, waiting=2600), spread(1)))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    of_prefill = [line["details"] for line in lines if line["details"]["kind"] == "prefill"]
    assert (of_prefill[0]["current"], of_prefill[0]["target"]) == (1, 3)
    assert math.isclose(of_prefill[0]["inputs"]["queue"], 2.6)
    assert of_prefill[0]["replicas"][0]["num_waiting_tokens"] == 2600
    assert len([line for line in lines if line["details"]["kind"] == "decode"]) == 1  # nothing new: not said again
