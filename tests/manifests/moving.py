"""A decode pod ends, as when its machine is drained, while somebody talks: its preStop hook, where its session goes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from services.client import AsyncClient, AsyncSession
from services.common.messages import Finished
from services.common.sampling import SamplingParams

if TYPE_CHECKING:
    from tests.manifests.machines import Machine
    from tests.manifests.pod_machines import Pods

_FEW_WORDS = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


async def move_away(pods: Pods, target: str, token: str) -> dict[str, Any]:
    """Ends the pod that a session's replica is in; one more is there for the replica that Serve starts instead."""
    async with AsyncClient(target, token=token) as client:
        session, other = await client.create_session(), await client.create_session()
        before = await say(session, "Tell me a long story about the sea.")
        ending = pod_of(pods, before.replica)
        pods.add("decode")
        hook = asyncio.create_task(asyncio.to_thread(pods.hook, ending))
        num_turns = 0
        while not hook.done():
            await say(other, "And then?")
            num_turns += 1
            await asyncio.sleep(1.0)
        after = await say(session, "What happened then?")
    return {
        "hook": hook.result(),
        "num_turns_meanwhile": num_turns,
        "is_elsewhere": pod_of(pods, after.replica) is not ending,
        "num_prompt_tokens": before.usage.num_prompt_tokens,
        "num_cached_tokens": after.usage.num_cached_tokens,
        "sources": [origin.source.name for origin in after.kv_origins],
    }


async def say(session: AsyncSession, line: str) -> Finished:
    """One turn."""
    events = [event async for event in session.chat(line, sampling=_FEW_WORDS)]
    assert isinstance(events[-1], Finished)
    return events[-1]


def pod_of(pods: Pods, replica: str) -> Machine:
    """Where a decode replica runs, by its name in the registry."""
    replicas = (pods.deployments() or {})["decode"]["replicas"]
    (address,) = [each["node_ip"] for each in replicas if each["replica_id"] == replica.partition("-")[2]]
    return next(each for each in pods.machines if each.address == address)
