"""Where a prompt is computed: the cheapest way by what was measured."""

from __future__ import annotations

from dataclasses import replace

from services.common.messages import PrefillPlace
from services.decode.plan import Situation, plan, replan
from services.replica.handover import PrefillLoad
from services.replica.measured import Measured

IDLE_PREFILL = PrefillLoad(num_replicas=1, num_waiting_tokens=0, prefill_tokens_per_s=1000.0)
IDLE = Situation(
    num_tokens=1000,
    num_local_tokens=0,
    num_remote_tokens=0,
    bytes_per_token=10_000,
    num_running=0,
    num_waiting_tokens=0,
    prefill_tokens_per_s=1000.0,
    transfer_bytes_per_s=1e9,
    handover_ms=10.0,
    prefill=IDLE_PREFILL,
)


def test_a_short_remainder_is_computed_here() -> None:
    decision = plan(replace(IDLE, num_local_tokens=980), "auto")
    assert decision.place is PrefillPlace.DECODE
    assert "20 tokens" in decision.reason


def test_a_long_prompt_goes_to_prefill_so_that_nothing_is_held_up_here() -> None:
    assert plan(IDLE, "auto").place is PrefillPlace.PREFILL


def test_what_runs_here_makes_computing_here_dearer() -> None:
    quiet = replace(IDLE, num_tokens=30)
    assert plan(quiet, "auto").place is PrefillPlace.DECODE
    assert plan(replace(quiet, num_running=8), "auto").place is PrefillPlace.PREFILL


def test_what_waits_here_makes_computing_here_dearer() -> None:
    quiet = replace(IDLE, num_tokens=30)
    assert plan(replace(quiet, num_waiting_tokens=500), "auto").place is PrefillPlace.PREFILL


def test_a_queue_at_prefill_keeps_the_prompt_here() -> None:
    busy = replace(IDLE_PREFILL, num_waiting_tokens=5000)
    assert plan(replace(IDLE, prefill=busy), "auto").place is PrefillPlace.DECODE


def test_measured_rates_turn_the_decision_around() -> None:
    slow = replace(IDLE_PREFILL, prefill_tokens_per_s=100.0)
    fast = replace(IDLE_PREFILL, prefill_tokens_per_s=50_000.0)
    short = replace(IDLE, num_tokens=100)
    assert plan(replace(IDLE, prefill=slow), "auto").place is PrefillPlace.DECODE
    assert plan(replace(short, prefill=fast), "auto").place is PrefillPlace.PREFILL


def test_a_slow_link_keeps_the_prompt_here() -> None:
    assert plan(replace(IDLE, transfer_bytes_per_s=1e6), "auto").place is PrefillPlace.DECODE


def test_the_history_that_prefill_would_have_to_fetch_counts() -> None:
    far = replace(IDLE, num_tokens=10_100, num_local_tokens=10_000, transfer_bytes_per_s=1e8)
    assert plan(far, "auto").place is PrefillPlace.DECODE
    assert plan(replace(far, transfer_bytes_per_s=1e12, num_running=2), "auto").place is PrefillPlace.PREFILL


def test_without_prefill_replicas_everything_is_computed_here() -> None:
    decision = plan(replace(IDLE, prefill=None), "auto")
    assert decision.place is PrefillPlace.DECODE
    assert "no prefill replica" in decision.reason
    assert plan(replace(IDLE, prefill=None), "always").place is PrefillPlace.DECODE


def test_always_and_never_leave_no_choice() -> None:
    assert plan(replace(IDLE, num_local_tokens=990), "always").place is PrefillPlace.PREFILL
    assert plan(replace(IDLE, num_running=50), "never").place is PrefillPlace.DECODE


def test_nothing_missing_is_nothing_to_ask_for() -> None:
    decision = plan(replace(IDLE, num_local_tokens=1000), "always")
    assert decision.place is PrefillPlace.DECODE
    assert decision.reason == "everything is held here"


def test_history_elsewhere_is_fetched_when_that_is_faster_than_computing_it() -> None:
    moved = replace(IDLE, num_tokens=2000, num_remote_tokens=1900)
    decision = plan(moved, "auto")
    assert decision.fetches_history
    assert not plan(replace(moved, transfer_bytes_per_s=1e5), "auto").fetches_history
    assert not plan(replace(moved, num_remote_tokens=8), "auto").fetches_history


def test_history_that_is_held_here_is_not_fetched() -> None:
    assert not plan(replace(IDLE, num_local_tokens=960, num_remote_tokens=960), "auto").fetches_history


def test_with_the_history_fetched_the_short_rest_is_computed_here() -> None:
    decision = replan(replace(IDLE, num_tokens=2000), 1990, "auto", fetches_history=True)
    assert decision.place is PrefillPlace.DECODE
    assert decision.fetches_history


def test_before_anything_is_measured_replicas_are_taken_for_equals() -> None:
    unknown = replace(
        IDLE,
        prefill_tokens_per_s=None,
        transfer_bytes_per_s=None,
        handover_ms=None,
        prefill=replace(IDLE_PREFILL, prefill_tokens_per_s=None),
    )
    assert "assumed" in plan(unknown, "auto").reason
    assert plan(unknown, "auto").place is PrefillPlace.PREFILL
    assert plan(replace(unknown, num_tokens=40), "auto").place is PrefillPlace.DECODE


def test_a_measurement_is_the_median_of_the_last_ones_without_the_first() -> None:
    measured = Measured()
    measured.record(500.0)
    assert measured.value is None
    for value in (10.0, 12.0, 900.0):
        measured.record(value)
    assert measured.value == 12.0
    for _ in range(9):
        measured.record(20.0)
    assert measured.value == 20.0
