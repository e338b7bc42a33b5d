"""A replica that hangs closes no connection: silence ends the wait, another one or local compute goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil  # Ray brings it
import pytest

# isort: split
from tests.cluster.serving import Serving, collect, local_conversation, prefill_processes, process_at

# isort: split
from services.client import AsyncClient
from services.common.messages import Delta
from services.common.sampling import SamplingParams
from services.local import LocalPipeline
from tests.cluster.whole.loads import chained, local_tokens

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(300)]

REPLY = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
DEADLINE_S = 45.0  # of the turns: none may need it


@contextmanager
def stopped(processes: list[psutil.Process]) -> Iterator[None]:
    """They hang, and go on afterwards."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


@pytest.mark.parametrize("num_hanging", [1, 2])
async def test_a_prompt_is_computed_while_prefill_replicas_hang(
    cluster: tuple[Serving, AsyncClient], local: LocalPipeline, num_hanging: int
) -> None:
    started, client = cluster
    token_ids = [(i * 37 + num_hanging) % 8000 + 100 for i in range(900)]
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    expected = await asyncio.to_thread(local_tokens, local, token_ids, sampling)
    with stopped(prefill_processes()[:num_hanging]):
        turn = await collect(client.generate(token_ids, sampling=sampling, timeout_s=DEADLINE_S))
    assert turn.token_ids == expected
    await started.is_whole()


async def test_a_prefill_replica_that_hangs_in_mid_call_is_given_up(
    cluster: tuple[Serving, AsyncClient], local: LocalPipeline
) -> None:
    started, client = cluster
    token_ids = [(i * 41) % 8000 + 100 for i in range(1400)]
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    expected = await asyncio.to_thread(local_tokens, local, token_ids, sampling)
    turn = asyncio.create_task(collect(client.generate(token_ids, sampling=sampling, timeout_s=DEADLINE_S)))
    await asyncio.sleep(0.3)
    with stopped(prefill_processes()):
        assert (await turn).token_ids == expected
    await started.is_whole()


async def test_a_decode_replica_that_hangs_in_mid_stream_costs_no_token(
    cluster: tuple[Serving, AsyncClient], local: LocalPipeline
) -> None:
    started, client = cluster
    line = "Tell me a story about a clock."
    (expected,) = local_conversation(local, [line], REPLY)
    session = await client.create_session()
    events = session.chat(line, sampling=REPLY, timeout_s=DEADLINE_S)
    seen: list[Any] = []
    async for event in events:
        seen.append(event)
        if isinstance(event, Delta) and len(seen) > 10:
            break
    address = next(each.address for each in await started.replicas() if each.replica_id == seen[0].routing.replica)
    with stopped([process_at(address)]):
        turn = await collect(chained(seen, events))
    assert turn.token_ids == expected.token_ids
    assert turn.finished.num_resumes == 1
    await started.is_whole()
