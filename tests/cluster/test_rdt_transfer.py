"""Ray Direct Transport where it is hard: dying processes, stopped ones, cancellation, and inside Serve replicas."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

# isort: split
import tests.cluster.ray_session  # noqa: F401  (sets variables that Ray reads when it is imported)

# isort: split
import ray
from ray import serve

from services.common.errors import InvalidSettings, TransferFailed
from services.transfer.base import FetchReport, Identity
from services.transfer.rdt import RdtTransfer
from tests.contract.transfer_replica import MODEL, RdtReplica, Remote, in_actor, random_pool, start_actor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def receiver(ray_cluster: None) -> Iterator[Remote]:
    """One receiver for all tests of this file: it has to outlive every publisher."""
    actor = start_actor(100, fetch_timeout_s=3.0)
    yield in_actor(actor)
    ray.kill(actor)


@pytest.fixture
def publisher(ray_cluster: None) -> Iterator[Any]:
    """A publisher (the actor) that the test may kill."""
    actor = start_actor(1, fetch_timeout_s=0.5)
    yield actor
    ray.kill(actor)


async def _arrives(publisher: Remote, receiver: Remote, block_ids: list[int]) -> bool:
    message = await publisher.call("publish", block_ids)
    outcome = await receiver.call("fetch", message, block_ids)
    await publisher.call("release", message["ticket"].ticket_id)
    same = await receiver.call("read", block_ids) == await publisher.call("read", block_ids)
    return isinstance(outcome, FetchReport) and same


async def test_a_dead_publisher_is_an_error_and_the_receiver_lives_on(publisher: Any, receiver: Remote) -> None:
    assert await _arrives(in_actor(publisher), receiver, [3, 4])  # so that the two are connected
    message = await in_actor(publisher).call("publish", [1, 2])
    pid = await in_actor(publisher).call("pid")
    ray.kill(publisher)
    await _until_dead(pid)
    outcome = await asyncio.wait_for(receiver.call("fetch", message, [1, 2]), timeout=20)
    assert outcome in [("sender_lost", True), ("timeout", True)]
    another = start_actor(2)
    assert await _arrives(in_actor(another), receiver, [1, 2])
    ray.kill(another)


async def _until_dead(pid: int) -> None:
    async with asyncio.timeout(30):
        while _is_running(pid):
            await asyncio.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_publisher_that_dies_while_it_is_read_gives_whole_blocks_or_errors(
    publisher: Any, receiver: Remote
) -> None:
    source = in_actor(publisher)
    content = await source.call("read", range(24))
    messages = [await source.call("publish", [i, i + 12]) for i in range(12)]
    fetches = [asyncio.ensure_future(receiver.call("fetch", m, [i, i + 12])) for i, m in enumerate(messages)]
    os.kill(await source.call("pid"), signal.SIGKILL)
    outcomes = await asyncio.wait_for(asyncio.gather(*fetches), timeout=60)
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, FetchReport):
            assert await receiver.call("read", [i, i + 12]) == [content[i], content[i + 12]]
        else:
            assert outcome in [("sender_lost", True), ("timeout", True), ("timeout", False)]
    another = start_actor(2)
    assert await _arrives(in_actor(another), receiver, [1, 2])
    ray.kill(another)


async def test_a_dead_borrower_does_not_keep_the_blocks(publisher: Any) -> None:
    borrower = start_actor(3)
    message = await in_actor(publisher).call("publish", [1, 2], ttl_s=0.2)
    assert isinstance(await in_actor(borrower).call("fetch", message, [1, 2]), FetchReport)
    del message
    ray.kill(borrower)
    await _until_free(in_actor(publisher))
    assert await in_actor(publisher).call("released_blocks") == [(1, 2)]


async def _until_free(publisher: Remote) -> None:
    """Wait until nothing is published any more, neither for the transfer nor for Ray."""
    async with asyncio.timeout(30):
        while await publisher.call("num_held") or (await publisher.call("num_ray_entries"))[1]:
            await asyncio.sleep(0.05)


async def test_fetches_leave_nothing_behind_in_ray(publisher: Any, receiver: Remote) -> None:
    source = in_actor(publisher)
    assert await _arrives(source, receiver, [1])
    before, _ = await receiver.call("num_ray_entries")
    for i in range(20):
        assert await _arrives(source, receiver, [i])
        message = await source.call("publish", [i])
        assert await receiver.call("fetch", message, [i, i + 1]) == ("truncated", False)
        assert await source.call("release", message["ticket"].ticket_id)
        del message
    assert (await receiver.call("num_ray_entries"))[0] <= before
    await _until_free(source)


async def test_a_stopped_publisher_never_leaves_the_receiver_hanging(publisher: Any, receiver: Remote) -> None:
    source = in_actor(publisher)
    assert await _arrives(source, receiver, [3])
    message = await source.call("publish", [1, 2], ttl_s=60.0)
    pid = await source.call("pid")
    os.kill(pid, signal.SIGSTOP)
    try:
        outcome = await asyncio.wait_for(receiver.call("fetch", message, [1, 2], None, 1.0), timeout=20)
    finally:
        os.kill(pid, signal.SIGCONT)
    # Through shared memory the receiver needs no help from the publisher, otherwise it does.
    assert isinstance(outcome, FetchReport) or outcome == ("timeout", True)
    assert await _arrives(source, receiver, [3])


async def test_a_cancelled_fetch_ends_only_when_nothing_writes_any_more(publisher: Any, receiver: Remote) -> None:
    source, block_ids = in_actor(publisher), list(range(20))
    for after_s in (0.0, 0.002, 0.01):
        message = await source.call("publish", block_ids)
        outcome = await receiver.call("fetch_cancelled", message, block_ids, after_s)
        assert outcome == "CancelledError" or "FetchReport" in outcome
        content = await receiver.call("read", block_ids)
        await asyncio.sleep(0.05)
        assert await receiver.call("read", block_ids) == content
        assert await source.call("release", message["ticket"].ticket_id)
    # One that cannot begin in time has not written at all.
    message = await source.call("publish", [1])
    assert await receiver.call("fetch", message, [1], None, 0.0) == ("timeout", False)


async def test_closing_gives_all_blocks_back_and_refuses_more() -> None:
    actor = start_actor(4)
    await in_actor(actor).call("publish", [1, 2])
    await in_actor(actor).call("close")
    assert await in_actor(actor).call("released_blocks") == [(1, 2)]
    with pytest.raises(TransferFailed, match="closed"):
        await in_actor(actor).call("publish", [1, 2])
    ray.kill(actor)


@pytest.mark.parametrize("name", ["RAY_SERVE_USE_GRPC_BY_DEFAULT", "RAY_SERVE_THROUGHPUT_OPTIMIZED"])
async def test_settings_that_break_references_are_refused_at_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    transfer = RdtTransfer(random_pool(5), model=MODEL, identity=Identity("replica", "incarnation"))
    with pytest.raises(InvalidSettings, match=name):
        await transfer.start()


class _ServeReplica(RdtReplica):
    """A replica in a Serve deployment; with a peer, it hands over blocks in both directions in one call."""

    def __init__(self, seed: int, peer: Any = None) -> None:
        super().__init__(seed, dtype="uint8")
        self._peer = peer.options(_by_reference=True) if peer else None
        self._started = False

    async def _ready(self) -> None:
        if not self._started:
            self._started = True
            await self.start()

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Fetch what the request offers, publish other blocks in return."""
        await self._ready()
        report = await self.fetch(request, request["into"])
        return {**await self.publish(request["wanted"]), "arrived": await self.read(request["into"]), "report": report}

    async def acknowledge(self, ticket_id: str) -> tuple[bool, list[tuple[int, ...]]]:
        """End the lease of what was published in return."""
        return await self.release(ticket_id), await self.released_blocks()

    async def exchange(self, i: int) -> bool:
        """Send two blocks, get two others back, all verified."""
        await self._ready()
        mine, theirs = [i, i + 10], [i + 1, i + 11]
        request: dict[str, Any] = await self.publish(mine)
        reply = await self._peer.answer.remote({**request, "into": mine, "wanted": theirs})
        assert await self.release(request["ticket"].ticket_id)
        report = await self.fetch(reply, theirs)
        acknowledged, _ = await self._peer.acknowledge.remote(reply["ticket"].ticket_id)
        arrived = isinstance(report, FetchReport) and isinstance(reply["report"], FetchReport)
        return acknowledged and arrived and reply["arrived"] == await self.read(mine)


async def test_serve_replicas_exchange_blocks_through_a_deployment_handle(ray_cluster: None) -> None:
    deployment = serve.deployment(_ServeReplica, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=64)
    serve.start(proxy_location="Disabled")
    try:
        peer = deployment.options(name="peer").bind(11)
        handle = serve.run(deployment.options(name="caller").bind(12, peer), name="exchange", route_prefix=None)
        assert await handle.exchange.remote(0)
        assert all(await asyncio.gather(*[handle.exchange.remote(i) for i in (0, 2, 4, 6)]))
    finally:
        serve.shutdown()
