"""What tests do to a whole cluster: load on one replica, and looking whether anything is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from services.client import AsyncSession
from services.common.messages import Delta
from services.common.sampling import SamplingParams
from services.gateway.decode_client import DecodeClient
from services.gateway.silence import Silence
from services.local import LocalPipeline, LocalRequest
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.sessions.registry import ReplicaRecord
from services.wire import values
from tests.cluster.serving import HEARTBEAT_S, Serving

# A second for the work to end, and the beats that say so, on a machine that does other things too.
FREE_WITHIN_S = 1.0 + 8 * HEARTBEAT_S


async def _stays() -> bool:
    return False


@asynccontextmanager
async def busy(started: Serving, holder: ReplicaRecord) -> AsyncIterator[None]:
    """Many sequences run at one replica, and the registry shows it."""
    decode = DecodeClient()
    sampling = values.sampling_to_proto(SamplingParams(temperature=0.0, max_tokens=280, ignore_eos=True))

    async def load(number: int) -> None:
        request = pb.GenerateRequest(
            request_id=f"load-{number}",
            incarnation=holder.incarnation,
            salt=bytes(16),
            token_ids=[number + 100, 200, 300],
            sampling=sampling,
        )
        async for _ in decode.generate(holder.address, request, None, None, Silence(_stays, 60.0)):
            pass

    tasks = [asyncio.create_task(load(number)) for number in range(24)]
    try:
        await started.wait_for(
            lambda records: any(each.replica_id == holder.replica_id and each.num_running >= 20 for each in records)
        )
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await decode.close()


async def nothing_is_left(started: Serving, session: AsyncSession) -> None:
    """Soon the session has no lease, and no replica holds a block for anybody."""

    def is_idle(records: Sequence[ReplicaRecord]) -> bool:
        return all(not each.num_running and each.num_free_blocks == each.num_blocks for each in records)

    async with asyncio.timeout(FREE_WITHIN_S):
        while (await session.info()).active_turn is not None:
            await asyncio.sleep(0.02)
    await started.wait_for(is_idle, FREE_WITHIN_S)


def local_tokens(local: LocalPipeline, token_ids: list[int], sampling: SamplingParams) -> tuple[int, ...]:
    events = [event for _, event in local.run([LocalRequest(token_ids, sampling)])]
    return tuple(token_id for event in events if isinstance(event, Delta) for token_id in event.token_ids)


async def chained(seen: list[Any], rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    for event in seen:
        yield event
    async for event in rest:
        yield event
