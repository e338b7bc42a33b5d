"""A replica reduced to what the transfer tests need: a pool, a transfer, and a way to look into both.

Used as it is in one process, as a Ray actor, and as a Serve deployment.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch

from services.common.errors import TransferFailed
from services.transfer.base import Expected, FetchReport, Identity, KVTicket, Transfer
from services.transfer.local import LocalHub, LocalTransfer

SHAPE = (24, 3, 4, 24)  # [num_blocks, num_layers, block_size, width]
BLOCK_SIZE = SHAPE[2]
MODEL = "model"


def random_pool(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A pool of random bytes (not all of them are numbers, which a transfer must not mind)."""
    generator = torch.Generator().manual_seed(seed)
    item_bytes = torch.empty(0, dtype=dtype).element_size()
    shape = (*SHAPE[:-1], SHAPE[-1] * item_bytes)
    random_bytes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return random_bytes.view(dtype)


class Replica:
    """Publishes from, and fetches into, one pool."""

    def __init__(self, pool: torch.Tensor, transfer: Transfer) -> None:
        self.pool = pool
        self.transfer = transfer
        self.released: list[tuple[int, ...]] = []

    async def start(self) -> None:
        """Make the transfer ready, where it needs that."""
        if hasattr(self.transfer, "start"):
            await self.transfer.start()

    async def publish(self, block_ids: Sequence[int], **options: Any) -> dict[str, KVTicket]:
        """Publish full blocks that begin at token 0, unless the options say otherwise."""
        options = {"first_token": 0, "num_tokens": len(block_ids) * BLOCK_SIZE, **options}
        return {"ticket": await self.transfer.publish(block_ids, on_release=self.released.append, **options)}

    async def fetch(
        self,
        message: dict[str, KVTicket],
        into_block_ids: Sequence[int],
        expected: Expected | None = None,
        timeout_s: float | None = None,
    ) -> FetchReport | tuple[str, bool]:
        """Fetch; a TransferFailed comes back as its cause and whether the blocks must be quarantined."""
        ticket = message["ticket"]
        expected = expected or Expected(ticket.first_token, ticket.num_tokens)
        try:
            return await self.transfer.fetch(ticket, into_block_ids, expected=expected, timeout_s=timeout_s)
        except TransferFailed as error:
            return str(error.cause), error.must_quarantine

    async def release(self, ticket_id: str) -> bool:
        """Acknowledge."""
        return await self.transfer.release(ticket_id)

    async def close(self) -> None:
        """Close the transfer."""
        await self.transfer.close()

    async def fetch_cancelled(self, message: dict[str, KVTicket], into_block_ids: Sequence[int], after_s: float) -> str:
        """Cancel a fetch after some time; the name of what it ends with."""
        task = asyncio.create_task(self.fetch(message, into_block_ids))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.wait({task})
        return "CancelledError" if task.cancelled() else repr(task.result())

    async def read(self, block_ids: Sequence[int]) -> list[bytes]:
        """The bytes of blocks."""
        return [self.pool[i].view(torch.uint8).cpu().numpy().tobytes() for i in block_ids]

    async def write(self, block_id: int, content: bytes) -> None:
        """Overwrite a block, whoever holds it."""
        block = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.pool[block_id].view(torch.uint8).copy_(block.view(SHAPE[1], SHAPE[2], -1))

    async def num_held(self) -> int:
        """Leases that have not ended."""
        return len(self.transfer.leases)

    async def released_blocks(self) -> list[tuple[int, ...]]:
        """What on_release has been called with since this was last asked."""
        released, self.released[:] = list(self.released), []
        return released

    async def pid(self) -> int:
        """The process that the replica lives in."""
        return os.getpid()


class RdtReplica(Replica):
    """A replica whose transfer is Ray Direct Transport; lives in an actor or a Serve replica."""

    def __init__(self, seed: int, dtype: str = "bfloat16", device: str = "cpu", **options: Any) -> None:
        from services.transfer.rdt import RdtTransfer

        pool = random_pool(seed, getattr(torch, dtype)).to(device)
        identity = Identity(f"replica-{seed}", f"incarnation-{seed}-{os.getpid()}")
        super().__init__(pool, RdtTransfer(pool, model=MODEL, identity=identity, **options))

    async def add_on_gpu(self, block_ids: Sequence[int]) -> None:
        """Give the GPU long work that ends in new block contents, and do not wait for it."""
        busy = torch.randn(4096, 4096, device=self.pool.device)
        for _ in range(20):
            busy = busy @ busy
        self.pool.view(torch.uint8)[block_ids] += (busy[0, 0] * 0 + 1).nan_to_num(1).to(torch.uint8)

    async def num_ray_entries(self) -> tuple[int, int]:
        """What Ray remembers here: references with metadata, and published objects."""
        import ray

        manager = ray._private.worker.global_worker.rdt_manager
        return len(manager._managed_rdt_metadata), manager.rdt_store.get_num_objects()


def local_replica(hub: LocalHub, seed: int, dtype: torch.dtype = torch.bfloat16) -> Replica:
    """A replica in this process."""
    pool = random_pool(seed, dtype)
    identity = Identity(f"replica-{seed}", f"incarnation-{seed}")
    return Replica(pool, LocalTransfer(hub, pool, model=MODEL, identity=identity))


class Remote:
    """Calls a replica's methods, wherever it lives: `await remote.call("publish", [1, 2])`."""

    def __init__(self, method: Callable[[str], Callable[..., Awaitable[Any]]]) -> None:
        self._method = method

    async def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The method's result."""
        return await self._method(name)(*args, **kwargs)


def in_process(replica: Replica) -> Remote:
    """The replica's own methods."""
    return Remote(lambda name: getattr(replica, name))


def in_actor(actor: Any) -> Remote:
    """The methods of an actor of RdtReplica."""
    return Remote(lambda name: getattr(actor, name).remote)


def start_actor(seed: int, **options: Any) -> Any:
    """An actor of RdtReplica, ready for use."""
    import ray

    actor = ray.remote(num_cpus=0, max_concurrency=64)(RdtReplica).remote(seed, **options)
    ray.get(actor.start.remote(), timeout=120)
    return actor
