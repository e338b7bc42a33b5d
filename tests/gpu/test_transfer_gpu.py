"""KV transfer between two replicas that share a GPU."""

from __future__ import annotations

import asyncio

import pytest
import torch

# isort: split
from tests.cluster.ray_session import local_ray

# isort: split
import ray

from services.transfer.base import FetchReport
from services.transfer.digest import BlockDigest
from tests.contract.transfer_replica import RdtReplica, Remote, in_actor, random_pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_digest_is_the_same_on_cpu_and_gpu(dtype: torch.dtype) -> None:
    pool = random_pool(1, dtype)
    assert BlockDigest(pool).of(range(24)) == BlockDigest(pool.cuda()).of(range(24))


@pytest.mark.ray
async def test_eight_transfers_at_once_in_both_directions_while_the_gpu_computes() -> None:
    async def move(source: Remote, target: Remote, block_ids: list[int], into: list[int]) -> None:
        await source.call("add_on_gpu", block_ids)
        message = await source.call("publish", block_ids)
        assert isinstance(await target.call("fetch", message, into), FetchReport)
        assert await target.call("read", into) == await source.call("read", block_ids)
        assert await source.call("release", message["ticket"].ticket_id)

    with local_ray():
        actors = [ray.remote(num_gpus=0.5, max_concurrency=64)(RdtReplica).remote(i, device="cuda") for i in (1, 2)]
        left, right = map(in_actor, actors)
        await asyncio.gather(left.call("start"), right.call("start"))
        for _ in range(5):
            moves = [move(left, right, [i, i + 4], [12 + i, 16 + i]) for i in range(4)]
            moves += [move(right, left, [i, i + 4], [12 + i, 16 + i]) for i in range(4)]
            await asyncio.gather(*moves)
        for actor in actors:
            ray.kill(actor)
