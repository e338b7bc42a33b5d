"""What every transfer does: `local` in one process, `rdt` between two Ray actors."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

# isort: split
from tests.cluster.ray_session import local_ray  # sets variables that Ray reads when it is imported

# isort: split
from services.transfer.base import Expected, FetchReport, KVTicket
from services.transfer.local import LocalHub
from tests.contract.transfer_replica import (
    BLOCK_SIZE,
    Remote,
    in_actor,
    in_process,
    local_replica,
    random_pool,
    start_actor,
)

Pair = tuple[Remote, Remote]


@pytest.fixture(scope="module")
def rdt_actors() -> Iterator[tuple[Any, Any]]:
    """Two actors for all tests of this file: starting one takes seconds."""
    import ray

    with local_ray():
        actors = [start_actor(seed, fetch_timeout_s=3.0) for seed in (1, 2)]
        yield actors[0], actors[1]
        for actor in actors:
            ray.kill(actor)


@pytest.fixture(params=["local", pytest.param("rdt", marks=pytest.mark.ray)])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """A publisher and a receiver, which hold nothing before and after the test."""
    if request.param == "rdt":
        left, right = map(in_actor, request.getfixturevalue("rdt_actors"))
    else:
        hub = LocalHub()
        left, right = (in_process(local_replica(hub, seed)) for seed in (1, 2))
    yield left, right
    for replica in (left, right):
        assert await replica.call("num_held") == 0
        await replica.call("released_blocks")


async def _refused(pair: Pair, message: dict[str, KVTicket], into: list[int], expected: Expected | None = None) -> str:
    """The cause of the failure that a fetch must end in."""
    outcome = await pair[1].call("fetch", message, into, expected)
    assert not isinstance(outcome, FetchReport)
    cause, must_quarantine = outcome
    assert not must_quarantine  # nothing writes any more
    return cause


async def test_blocks_arrive_in_order_and_nothing_else_is_touched(pair: Pair) -> None:
    publisher, receiver = pair
    before = await receiver.call("read", range(24))
    message = await publisher.call("publish", [7, 2, 20], first_token=8, num_tokens=2 * BLOCK_SIZE + 1)
    ticket = message["ticket"]
    assert (ticket.first_token, ticket.num_tokens, ticket.num_blocks) == (8, 2 * BLOCK_SIZE + 1, 3)
    report = await receiver.call("fetch", message, [5, 6, 1])
    sent = await publisher.call("read", [7, 2, 20])
    assert report.num_bytes == sum(map(len, sent))
    after = list(before)
    after[5], after[6], after[1] = sent
    assert await receiver.call("read", range(24)) == after
    assert await publisher.call("release", ticket.ticket_id)


async def test_neighbours_on_both_sides_travel_as_one_piece(pair: Pair) -> None:
    publisher, receiver = pair
    source, target = [3, 4, 5, 9, 10], [11, 12, 0, 1, 2]
    message = await publisher.call("publish", source, receiver_block_ids=target)
    assert message["ticket"].run_lengths == (2, 1, 2)
    report = await receiver.call("fetch", message, target)
    assert report.num_descriptors == 3
    assert await receiver.call("read", target) == await publisher.call("read", source)
    assert await publisher.call("release", message["ticket"].ticket_id)


async def test_targets_that_are_not_neighbours_where_the_ticket_says_so_are_refused(pair: Pair) -> None:
    message = await pair[0].call("publish", [3, 4], receiver_block_ids=[3, 4])
    assert await _refused(pair, message, [3, 5]) == "layout"
    assert await pair[0].call("release", message["ticket"].ticket_id)


def _flip_a_bit(blocks: list[bytes]) -> None:
    blocks[1] = blocks[1][:17] + bytes([blocks[1][17] ^ 128]) + blocks[1][18:]


def _swap_two_blocks(blocks: list[bytes]) -> None:
    blocks[0], blocks[2] = blocks[2], blocks[0]


def _cut_off_the_end(blocks: list[bytes]) -> None:
    blocks[2] = blocks[2][:-8] + bytes(8)


def _swap_two_tokens(blocks: list[bytes]) -> None:
    blocks[0] = blocks[0][48:96] + blocks[0][:48] + blocks[0][96:]


@pytest.mark.parametrize("damage", [_flip_a_bit, _swap_two_blocks, _cut_off_the_end, _swap_two_tokens])
async def test_blocks_that_arrive_different_are_refused(pair: Pair, damage: Callable[[list[bytes]], None]) -> None:
    publisher, _ = pair
    block_ids = [1, 2, 3]
    message = await publisher.call("publish", block_ids)
    good = await publisher.call("read", block_ids)
    blocks = list(good)
    damage(blocks)
    for block_id, content in zip(block_ids, blocks, strict=True):
        await publisher.call("write", block_id, content)
    assert await _refused(pair, message, [8, 9, 10]) == "digest"
    for block_id, content in zip(block_ids, good, strict=True):
        await publisher.call("write", block_id, content)
    assert await publisher.call("release", message["ticket"].ticket_id)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"layout": "another"}, "layout"),
        ({"block_size": BLOCK_SIZE * 2}, "layout"),
        ({"run_lengths": (1, 1)}, "truncated"),
        ({"digests": b""}, "truncated"),
        ({"first_token": 4}, "position"),
        ({"num_tokens": 9}, "position"),
        ({"expires_at_s": 0.0}, "expired"),
    ],
)
async def test_tickets_that_do_not_fit_are_refused(pair: Pair, change: dict[str, Any], cause: str) -> None:
    message = await pair[0].call("publish", [1, 2, 3])
    ticket = dataclasses.replace(message["ticket"], **change)
    assert await _refused(pair, {"ticket": ticket}, [8, 9, 10], Expected(0, 12)) == cause
    assert await pair[0].call("release", ticket.ticket_id)


async def test_another_incarnation_of_the_publisher_is_refused(pair: Pair) -> None:
    message = await pair[0].call("publish", [1])
    assert await _refused(pair, message, [8], Expected(0, BLOCK_SIZE, incarnation="newer")) == "incarnation"
    incarnation = message["ticket"].publisher.incarnation
    assert isinstance(await pair[1].call("fetch", message, [8], Expected(0, BLOCK_SIZE, incarnation)), FetchReport)
    assert await pair[0].call("release", message["ticket"].ticket_id)


async def test_blocks_are_held_until_acknowledged_and_given_back_once(pair: Pair) -> None:
    publisher, receiver = pair
    message = await publisher.call("publish", [4, 5])
    await receiver.call("fetch", message, [4, 5])
    assert await publisher.call("released_blocks") == []
    ticket_id = message["ticket"].ticket_id
    assert [await publisher.call("release", ticket_id) for _ in range(3)] == [True, False, False]
    assert await publisher.call("released_blocks") == [(4, 5)]


async def test_blocks_come_back_when_nobody_acknowledges(pair: Pair) -> None:
    publisher, _ = pair
    message = await publisher.call("publish", [6, 7], ttl_s=0.01)
    while await publisher.call("num_held"):
        await asyncio.sleep(0.02)
    assert await publisher.call("released_blocks") == [(6, 7)]
    assert not await publisher.call("release", message["ticket"].ticket_id)
    assert await _refused(pair, message, [6, 7]) == "expired"


async def test_two_tickets_may_share_blocks(pair: Pair) -> None:
    publisher, receiver = pair
    first = await publisher.call("publish", [1, 2, 3])
    second = await publisher.call("publish", [2, 3, 4])
    assert await publisher.call("release", first["ticket"].ticket_id)
    assert isinstance(await receiver.call("fetch", second, [10, 11, 12]), FetchReport)
    assert await receiver.call("read", [10, 11, 12]) == await publisher.call("read", [2, 3, 4])
    assert await publisher.call("release", second["ticket"].ticket_id)


async def test_eight_transfers_at_once_in_both_directions_are_all_right(pair: Pair) -> None:
    async def move(source: Remote, target: Remote, block_ids: list[int], into: list[int]) -> None:
        message = await source.call("publish", block_ids)
        assert isinstance(await target.call("fetch", message, into), FetchReport)
        assert await target.call("read", into) == await source.call("read", block_ids)
        assert await source.call("release", message["ticket"].ticket_id)

    left, right = pair
    for _ in range(3):
        moves = [move(left, right, [i, i + 4], [12 + i, 16 + i]) for i in range(4)]
        moves += [move(right, left, [i, i + 4], [12 + i, 16 + i]) for i in range(4)]
        await asyncio.gather(*moves)


@pytest.mark.parametrize("block_ids", [[], [1, 1], [24], [-1]])
async def test_unknown_and_repeated_blocks_are_refused(pair: Pair, block_ids: list[int]) -> None:
    with pytest.raises(ValueError, match="block id"):
        await pair[0].call("publish", block_ids)


async def test_tokens_that_need_another_number_of_blocks_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="do not fill"):
        await pair[0].call("publish", [1, 2], num_tokens=BLOCK_SIZE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
async def test_local_moves_every_dtype_between_any_blocks(dtype: str) -> None:
    import torch

    hub = LocalHub()
    left, right = (local_replica(hub, seed, getattr(torch, dtype)) for seed in (1, 2))
    message = await left.publish(range(24))
    assert isinstance(await right.fetch(message, list(reversed(range(24)))), FetchReport)
    assert torch.equal(right.pool.flip(0).view(torch.uint8), random_pool(1, getattr(torch, dtype)).view(torch.uint8))
    await left.close()
    assert left.released == [tuple(range(24))]
    assert await right.fetch(message, list(range(24))) == ("sender_lost", False)
