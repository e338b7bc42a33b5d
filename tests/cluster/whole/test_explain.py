"""Explain says what happens: the same replica, reason and counts as the turn that follows it."""

from __future__ import annotations

import random

import pytest

# isort: split
from tests.cluster.serving import Serving, Turn, collect

# isort: split
from services.client import AsyncClient, AsyncSession
from services.common.messages import Explanation, RoutingReason
from services.common.sampling import SamplingParams
from tests.cluster.whole.loads import busy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

LINES = ("Tell me a story about a fox.", "Who helped?", "And then?", "How did it end?", "Say it in other words.")


async def explained(started: Serving, session: AsyncSession, line: str, num_tokens: int) -> tuple[Explanation, Turn]:
    """The dry run and the turn, of a cluster that is quiet between them."""
    explanation = await session.explain(line)
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    return explanation, await collect(session.chat(line, sampling=sampling))


def check(explanation: Explanation, turn: Turn) -> None:
    routing, happened = explanation.routing, turn.started.routing
    assert (routing.replica, routing.reason) == (happened.replica, happened.reason)
    assert turn.finished.replica == routing.replica
    assert explanation.num_prompt_tokens == turn.started.num_prompt_tokens == turn.finished.usage.num_prompt_tokens
    held = {each.replica: each.num_held_tokens for each in routing.candidates}
    assert held == {each.replica: each.num_held_tokens for each in happened.candidates}
    # What is believed to be held is held: blocks were found here or fetched, all but the last part of a block.
    assert explanation.num_cached_tokens <= turn.finished.usage.num_cached_tokens + 16


async def test_explain_agrees_with_every_turn_of_interleaved_sessions(cluster: tuple[Serving, AsyncClient]) -> None:
    started, client = cluster
    rng = random.Random(1)
    sessions = [await client.create_session() for _ in range(3)]
    for line in LINES:
        for session in rng.sample(sessions, len(sessions)):
            await started.is_whole()
            explanation, turn = await explained(started, session, line, rng.choice((8, 24, 40)))
            check(explanation, turn)
            if turn.started.turn > 1:
                assert explanation.routing.reason is RoutingReason.HELD_PREFIX


async def test_explain_agrees_when_the_holder_is_busy(cluster: tuple[Serving, AsyncClient]) -> None:
    started, client = cluster
    session = await client.create_session()
    _, first = await explained(started, session, LINES[0], 120)
    await started.is_whole()
    holder = next(each for each in await started.replicas() if each.replica_id == first.finished.replica)
    async with busy(started, holder):
        explanation, second = await explained(started, session, LINES[1], 24)
    check(explanation, second)
    assert explanation.routing.reason is RoutingReason.HOLDER_OVERLOADED
