"""Interleaved conversations through the whole cluster give the tokens of one process, whatever its shape."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

# isort: split
from tests.cluster.serving import GREEDY, Serving, Turn, client_of, collect, local_conversation, oracle, serving

# isort: split
from services.client import AsyncClient, AsyncSession
from services.common.errors import Exhausted
from services.local import LocalPipeline

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

TOPICS = (
    *("a fox", "a lantern", "two sisters", "the sea", "an old clock", "a red kite", "the moon", "a lost key"),
    *("a whale", "snow", "a baker", "a bridge", "the wind", "a drum", "a map", "a garden", "a train", "a star"),
    *("a cat", "rain"),
)
QUESTIONS = ("Tell me a story about {}.", "Who helped?", "How did it end? Say it in other words, please.")
SMALL_POOL = {"num_blocks": 48}
SHAPES: dict[str, tuple[tuple[int, int], dict[str, dict[str, Any]]]] = {
    "two-by-two": ((2, 2), {}),
    "one-by-one-no-reuse": ((1, 1), {"decode": {"reuse_history": False}}),
    "one-by-one-small-always-prefill": ((1, 1), {"decode": {"remote_prefill": "always"}, "engine": SMALL_POOL}),
    "two-by-two-small-random": ((2, 2), {"routing": {"policy": "random"}, "engine": SMALL_POOL}),
}


@pytest.fixture(scope="module")
def local() -> LocalPipeline:
    return oracle()


@pytest.fixture(params=SHAPES)
def shaped(request: pytest.FixtureRequest, ray_cluster: None) -> Iterator[Serving]:
    shape, changes = SHAPES[request.param]
    with serving(*shape, **changes) as started:
        yield started


def lines_about(topic: str) -> list[str]:
    return [question.format(topic) for question in QUESTIONS]


async def converse(client: AsyncClient, topic: str) -> list[Turn]:
    session = await client.create_session()
    return [await patiently(session, line) for line in lines_about(topic)]


async def patiently(session: AsyncSession, line: str) -> Turn:
    """Comes again while there is no room, as a client should: a turn that is refused has left nothing behind."""
    while True:
        try:
            return await collect(session.chat(line, sampling=GREEDY))
        except Exhausted:
            await asyncio.sleep(0.1)


async def test_interleaved_conversations_give_the_tokens_of_one_process(shaped: Serving, local: LocalPipeline) -> None:
    await shaped.is_whole()
    async with client_of(shaped) as client:
        conversations = await asyncio.gather(*(converse(client, topic) for topic in TOPICS))
    await shaped.is_whole()
    for topic, turns in zip(TOPICS, conversations, strict=True):
        expected = local_conversation(local, lines_about(topic), GREEDY)
        assert [turn.token_ids for turn in turns] == [turn.token_ids for turn in expected]
        assert [turn.text for turn in turns] == [turn.text for turn in expected]
        assert [turn.started.turn for turn in turns] == [1, 2, 3]
