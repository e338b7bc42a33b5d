"""A turn that is given up at any stage, by its client or by its deadline, leaves nothing behind within a second."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass

import pytest

# isort: split
from tests.cluster.serving import GREEDY, Serving, collect

# isort: split
from services.client import AsyncClient, AsyncSession
from services.common.errors import AntiphonError, DeadlineExceeded
from services.common.messages import Delta, Message, Started
from services.common.sampling import SamplingParams
from tests.cluster.whole.loads import busy, nothing_is_left

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

REPLY = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
WORDS = ("fox", "lantern", "river", "bell", "ferry", "garden", "whale", "story", "winter", "bridge", "forest")


def long_text(seed: int) -> str:
    """Some hundred tokens, never the same twice: a prefill replica computes them, and they are handed over."""
    return " ".join(random.Random(seed).choices(WORDS, k=500))


@dataclass(frozen=True)
class Timeline:
    """When, in seconds from its start, an undisturbed turn was admitted, had its first token, had ended."""

    admitted_s: float
    first_token_s: float
    ended_s: float

    def moments(self) -> list[float]:
        """In every stage: session and tokenizing, routing, prefill and transfer, the hand-over, decode."""
        waiting_s, replying_s = self.first_token_s - self.admitted_s, self.ended_s - self.first_token_s
        return [
            0.0,
            self.admitted_s * 0.3,
            self.admitted_s * 0.8,
            *(self.admitted_s + waiting_s * part for part in (0.1, 0.5, 0.9)),
            *(self.first_token_s + replying_s * part for part in (0.02, 0.1, 0.6)),
        ]


async def timeline(session: AsyncSession, text: str) -> Timeline:
    began_s, seen = time.perf_counter(), []
    async for event in session.chat(text, sampling=REPLY):
        if isinstance(event, Started) or (isinstance(event, Delta) and len(seen) == 1):
            seen.append(time.perf_counter() - began_s)
    return Timeline(seen[0], seen[1], time.perf_counter() - began_s)


@pytest.mark.parametrize("by_deadline", [False, True], ids=["cancelled", "deadline"])
async def test_a_turn_given_up_at_any_stage_leaves_nothing(
    cluster: tuple[Serving, AsyncClient], by_deadline: bool
) -> None:
    started, client = cluster
    moments = (await timeline(await client.create_session(), long_text(int(by_deadline)))).moments()
    session = await client.create_session()
    for number, moment_s in enumerate(moments):
        text = long_text(10 + 100 * by_deadline + number)
        if by_deadline:
            with contextlib.suppress(DeadlineExceeded):
                await collect(session.chat(text, sampling=REPLY, timeout_s=max(moment_s, 0.001)))
        else:
            turn = asyncio.create_task(collect(session.chat(text, sampling=REPLY)))
            await asyncio.sleep(moment_s)
            turn.cancel()
            await asyncio.gather(turn, return_exceptions=True)
        await nothing_is_left(started, session)
    last = await collect(session.chat("Who helped?", sampling=GREEDY))
    assert last.token_ids


async def test_turns_given_up_while_they_wait_for_a_busy_replica_leave_nothing(
    cluster: tuple[Serving, AsyncClient],
) -> None:
    started, client = cluster
    records = [each for each in await started.replicas() if each.address]
    rng = random.Random(5)
    sessions = [await client.create_session() for _ in range(12)]
    async with busy(started, records[0]), busy(started, records[1]):
        turns = [
            asyncio.create_task(collect(session.chat([Message("user", long_text(500 + i))], sampling=REPLY)))
            for i, session in enumerate(sessions)
        ]
        for turn in turns:
            await asyncio.sleep(rng.uniform(0.0, 0.1))
            turn.cancel()
        ends = await asyncio.gather(*turns, return_exceptions=True)
    assert not [end for end in ends if isinstance(end, Exception) and not isinstance(end, AntiphonError)]
    for session in sessions:
        await nothing_is_left(started, session)
