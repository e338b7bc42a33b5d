"""Conversations in a closed loop, as a client sees them, and what their turns add up to.

The metrics are those of vLLM's benchmark_serving_multi_turn.py: TTFT, TPOT (the rest of the reply by token), ITL (gaps
between messages), latency, overall and by the turn's number; and what `finished` says of where the KV came from.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from services.client import AsyncClient, AsyncSession
from services.common.messages import Delta, Finished, Started
from services.common.sampling import SamplingParams

_WORDS = (
    "fox", "lantern", "river", "bell", "ferry", "garden", "whale", "story", "winter", "bridge", "forest", "window",
    "paper", "morning", "stone", "village", "music", "horse", "tower", "candle", "island", "letter", "market",
    "orange", "silver", "thunder", "valley", "wagon", "yellow", "apple", "basket", "castle",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """N sessions of R turns; num_clients turns at most run at once. Lengths in tokens, about."""

    num_sessions: int
    num_turns: int
    num_clients: int
    first_tokens: int
    later_tokens: int
    reply_tokens: int

    @property
    def num_session_tokens(self) -> int:
        """Of one session at its end, about."""
        return self.first_tokens + (self.num_turns - 1) * self.later_tokens + self.num_turns * self.reply_tokens

    def messages(self, seed: int, tokens_per_word: float) -> list[list[str]]:
        """The user's messages, by session; no two sessions begin alike."""
        rng = random.Random(seed)

        def text(num_tokens: int) -> str:
            return " ".join(rng.choices(_WORDS, k=max(1, round(num_tokens / tokens_per_word))))

        return [
            [text(self.first_tokens), *(text(self.later_tokens) for _ in range(self.num_turns - 1))]
            for _ in range(self.num_sessions)
        ]


@dataclass(frozen=True)
class TurnSample:
    """One turn. number: in its session, from 1. gaps_ms: between the messages that brought tokens."""

    number: int
    ttft_ms: float
    gaps_ms: tuple[float, ...]
    latency_ms: float
    started: Started
    finished: Finished

    @property
    def tpot_ms(self) -> float:
        return (self.latency_ms - self.ttft_ms) / max(self.finished.usage.num_generated_tokens - 1, 1)

    @property
    def overhead_ms(self) -> float:
        """Of the time to the first token, what the decode replica does not account for: the way there and back."""
        return self.ttft_ms - self.finished.timings.replica_first_token_ms


@dataclass(frozen=True)
class Run:
    """All turns of a load, and how long they took together."""

    turns: tuple[TurnSample, ...]
    wall_s: float

    @property
    def output_tokens_per_s(self) -> float:
        return sum(each.finished.usage.num_generated_tokens for each in self.turns) / self.wall_s


async def tokens_per_word(client: AsyncClient) -> float:
    """Of the texts that Load makes."""
    return len(await client.tokenize(" ".join(_WORDS))) / len(_WORDS)


async def one_turn(client: AsyncClient | AsyncSession, given: Any, sampling: SamplingParams, number: int) -> TurnSample:
    """One turn, timed at the client."""
    began_s = time.perf_counter()
    arrivals: list[float] = []
    started = None
    events = client.chat(given, sampling=sampling) if isinstance(client, AsyncSession) else client.generate(
        given, sampling=sampling
    )  # fmt: skip
    async for event in events:
        if isinstance(event, Delta):
            if event.token_ids:
                arrivals.append(time.perf_counter())
        elif isinstance(event, Started):
            started = event
        else:
            ended_s = time.perf_counter()
            assert started is not None
            gaps = tuple((after - before) * 1e3 for before, after in pairwise(arrivals))
            ttft_ms = (arrivals[0] - began_s) * 1e3
            return TurnSample(number, ttft_ms, gaps, (ended_s - began_s) * 1e3, started, event)
    raise AssertionError("a turn ended without saying so")


async def run(client: AsyncClient, load: Load, seed: int) -> Run:
    """The load to its end. Sessions take turns: whichever has waited longest is next."""
    sampling = SamplingParams(temperature=0.0, max_tokens=load.reply_tokens, ignore_eos=True)
    scripts = load.messages(seed, await tokens_per_word(client))
    waiting: asyncio.Queue[tuple[AsyncSession, list[str], int]] = asyncio.Queue()
    for script in scripts:
        waiting.put_nowait((await client.create_session(), script, 0))
    samples: list[TurnSample] = []
    num_left = load.num_sessions * load.num_turns

    async def worker() -> None:
        nonlocal num_left
        while num_left > 0:
            num_left -= 1
            session, script, index = await waiting.get()
            samples.append(await one_turn(session, script[index], sampling, index + 1))
            if index + 1 < len(script):
                waiting.put_nowait((session, script, index + 1))

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(load.num_clients):
            group.create_task(worker())
    return Run(tuple(samples), time.perf_counter() - began_s)


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """p50, p90, p99 and how many there were."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    cut = {name: ordered[min(len(ordered) - 1, int(part * len(ordered)))] for name, part in _PARTS.items()}
    return {name: round(value, 3) for name, value in cut.items()} | {"count": len(ordered)}


_PARTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_MEASURES: dict[str, Callable[[TurnSample], float]] = {
    "ttft_ms": lambda turn: turn.ttft_ms,
    "tpot_ms": lambda turn: turn.tpot_ms,
    "latency_ms": lambda turn: turn.latency_ms,
    "overhead_ms": lambda turn: turn.overhead_ms,
    "session_ms": lambda turn: turn.finished.timings.session_ms,
    "tokenize_ms": lambda turn: turn.finished.timings.tokenize_ms,
    "route_ms": lambda turn: turn.finished.timings.route_ms,
    "queue_ms": lambda turn: turn.finished.timings.queue_ms,
    "transfer_ms": lambda turn: turn.finished.timings.transfer_ms,
    "prefill_ms": lambda turn: turn.finished.timings.prefill_ms,
    "input_tokens": lambda turn: float(turn.finished.usage.num_prompt_tokens),
}


def summary(result: Run) -> dict[str, Any]:
    """Of a run: all metrics, those of TTFT by turn, and the origins of the prompt's KV."""
    numbers = sorted({turn.number for turn in result.turns})
    later = [turn for turn in result.turns if turn.number > 1]
    return {
        "wall_s": round(result.wall_s, 2),
        "requests_per_s": round(len(result.turns) / result.wall_s, 3),
        "output_tokens_per_s": round(result.output_tokens_per_s, 2),
        "itl_ms": percentiles(gap for turn in result.turns for gap in turn.gaps_ms),
        **{name: percentiles(map(measure, result.turns)) for name, measure in _MEASURES.items()},
        "ttft_ms_by_turn": {n: percentiles(t.ttft_ms for t in result.turns if t.number == n) for n in numbers},
        "ttft_ms_later_turns": percentiles(turn.ttft_ms for turn in later),
        "kv_origins_later_turns": origins(later),
        "prefill_s": round(sum(turn.finished.timings.prefill_ms for turn in result.turns) / 1e3, 2),
        "transfer_share_of_ttft_later_turns": _mean(t.finished.timings.transfer_ms / t.ttft_ms for t in later),
        "prefill_places": Counter(turn.finished.prefill_place.value for turn in result.turns),
        "routing_reasons": Counter(turn.started.routing.reason.value for turn in result.turns),
    }


def origins(turns: Sequence[TurnSample]) -> dict[str, float]:
    """Share of the prompt tokens by where their KV came from."""
    counts: Counter[str] = Counter()
    for turn in turns:
        for origin in turn.finished.kv_origins:
            counts[origin.source.value] += origin.num_tokens
    total = sum(counts.values())
    return {source: round(count / total, 4) for source, count in sorted(counts.items())}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return round(statistics.fmean(listed), 4) if listed else 0.0
