"""Transfer between processes and machines: Ray Direct Transport with NIXL, the same on CPU and GPU.

The receiver reads straight from the publisher's pool into its own; both pools are registered once, at start. One thread
makes all calls into the transport: its agents are not for many, and a blocking get on the event loop would also block
what frees objects.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError

from services.common.errors import InvalidSettings, TransferFailed
from services.common.tasks import until_done
from services.transfer.base import Cause, Expected, FetchReport, Identity, KVTicket, OnRelease
from services.transfer.digest import BlockDigest
from services.transfer.leases import Leases
from services.transfer.nixl_progress import progress_pauses
from services.transfer.runs import run_lengths, run_views
from services.transfer.verify import (
    check_blocks,
    check_digests,
    check_pool,
    check_ticket,
    check_tokens,
    layout_fingerprint,
)

T = TypeVar("T")

DEFAULT_TTL_S = 30.0
DEFAULT_FETCH_TIMEOUT_S = 10.0
DEFAULT_PROGRESS_PAUSE_S = 0.001
# With either of these Serve sends the arguments of calls in another way, and references to tensors lose their metadata.
_BREAKING_VARIABLES = ("RAY_SERVE_USE_GRPC_BY_DEFAULT", "RAY_SERVE_THROUGHPUT_OPTIMIZED")


class RdtTransfer:
    """See base.Transfer. Lives in a Ray actor or Serve replica; `start` before use.

    Tickets hold a Ray reference, so they travel in the arguments or results of Ray calls, nested in another object, and
    through DeploymentHandles that keep `_by_reference=True`.
    progress_pause_s: of the transport's thread between looks at its connections; 0 takes a core.
    compute_stream: the CUDA stream that writes the pool; None is the device's default stream.
    """

    def __init__(
        self,
        pool: torch.Tensor,
        *,
        model: str,
        identity: Identity,
        ttl_s: float = DEFAULT_TTL_S,
        fetch_timeout_s: float = DEFAULT_FETCH_TIMEOUT_S,
        progress_pause_s: float = DEFAULT_PROGRESS_PAUSE_S,
        compute_stream: torch.cuda.Stream | None = None,
    ) -> None:
        check_pool(pool)
        self.identity = identity
        self.pool = pool
        self.leases = Leases()
        self._ttl_s = ttl_s
        self._fetch_timeout_s = fetch_timeout_s
        self._progress_pause_us = round(progress_pause_s * 1e6)
        self._layout = layout_fingerprint(pool, model)
        self._digest = BlockDigest(pool)
        self._compute_stream = compute_stream
        self._stream: torch.cuda.Stream | None = None
        self._thread: ThreadPoolExecutor | None = None

    async def start(self) -> None:
        """Register the pool with the transport (about a second for the first GiB on a GPU)."""
        for name in _BREAKING_VARIABLES:
            if os.environ.get(name, "0").lower() not in ("", "0", "false"):
                raise InvalidSettings(f"{name} must not be set: KV references do not survive it")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-transfer")
        await self._on_thread(self._register)

    async def publish(
        self,
        block_ids: Sequence[int],
        *,
        first_token: int,
        num_tokens: int,
        on_release: OnRelease,
        receiver_block_ids: Sequence[int] | None = None,
        ttl_s: float | None = None,
    ) -> KVTicket:
        """See base.Transfer."""
        check_blocks(block_ids, self.pool)
        block_size = self.pool.shape[2]
        check_tokens(num_tokens, len(block_ids), block_size)
        ttl_s = self._ttl_s if ttl_s is None else ttl_s
        lengths = run_lengths(block_ids, receiver_block_ids)
        written = self._compute_event()
        digests, ref = await self._on_thread(lambda: self._put(block_ids, lengths, written))
        ticket = KVTicket(
            ticket_id=uuid.uuid4().hex,
            publisher=self.identity,
            layout=self._layout,
            first_token=first_token,
            num_tokens=num_tokens,
            block_size=block_size,
            run_lengths=lengths,
            digests=digests,
            expires_at_s=time.time() + ttl_s,
            ref=ref,
        )
        # The lease outlasts the last moment at which a fetch may begin by as long as a fetch may take.
        held_s = ttl_s + self._fetch_timeout_s
        self.leases.hold(ticket.ticket_id, tuple(block_ids), on_release, ttl_s=held_s, ref=ref)
        return ticket

    async def fetch(
        self, ticket: KVTicket, into_block_ids: Sequence[int], *, expected: Expected, timeout_s: float | None = None
    ) -> FetchReport:
        """See base.Transfer. timeout_s counts from the call, and is at most the transfer's own."""
        check_blocks(into_block_ids, self.pool)
        if ticket.publisher == self.identity:
            raise ValueError("a replica does not fetch its own blocks")
        limit_s = min(self._fetch_timeout_s, timeout_s) if timeout_s is not None else self._fetch_timeout_s
        called = time.perf_counter()
        free = self._compute_event()
        try:
            check_ticket(ticket, into_block_ids, expected, layout=self._layout, block_size=self.pool.shape[2])
            return await self._on_thread(lambda: self._read(ticket, into_block_ids, called, called + limit_s, free))
        finally:
            _forget_borrowed(ticket.ref)

    async def release(self, ticket_id: str) -> bool:
        """See base.Transfer."""
        return self.leases.end(ticket_id)

    async def close(self) -> None:
        """See base.Transfer. The pool stays registered: others may still read it, and the process is about to end."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(thread.shutdown)
        self.leases.end_all()

    async def _on_thread(self, call: Callable[[], T]) -> T:
        """Run on the transfer thread. A call that has begun is waited for even when cancelled: it may be writing."""
        if self._thread is None:
            raise TransferFailed(Cause.CLOSED, "this replica's transfer is not running")
        future = self._thread.submit(call)
        waiter = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            if not future.cancel():
                with suppress(asyncio.CancelledError):  # raised again below
                    await until_done(waiter)
                error = waiter.exception()
                if isinstance(error, TransferFailed) and error.must_quarantine:
                    raise error from None
            raise

    def _register(self) -> None:
        if self.pool.is_cuda:
            # Replicas that share a GPU see no NVLink between them, and without this fall back to 0.4 GiB/s.
            os.environ.setdefault("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "on")
            self._stream = torch.cuda.Stream(self.pool.device)
            # Otherwise each put would wait for everything the GPU has been given to do.
            ray.experimental.set_nixl_cuda_stream(self._stream)
        with progress_pauses(self._progress_pause_us):
            ray.experimental.register_nixl_memory(self.pool)  # the first one makes the agent

    def _put(
        self, block_ids: Sequence[int], lengths: tuple[int, ...], written: torch.cuda.Event | None
    ) -> tuple[bytes, object]:
        with self._on_stream_after(written):
            digests = self._digest.of(block_ids)
            return digests, ray.put(run_views(self.pool, block_ids, lengths), _tensor_transport="nixl")

    def _read(
        self,
        ticket: KVTicket,
        into_block_ids: Sequence[int],
        called: float,
        deadline: float,
        free: torch.cuda.Event | None,
    ) -> FetchReport:
        with self._on_stream_after(free):
            if free is not None:
                free.synchronize()  # the read heeds no stream, and kernels may still use what the blocks held before
            begun = time.perf_counter()
            if begun >= deadline:
                raise TransferFailed(Cause.TIMEOUT, "the transfer did not begin in time")
            if not isinstance(ticket.ref, ray.ObjectRef):
                raise TransferFailed(Cause.LAYOUT, "the ticket is of another transport")
            _get_into(ticket.ref, run_views(self.pool, into_block_ids, ticket.run_lengths), deadline - begun)
            landed = time.perf_counter()
            check_digests(ticket, self._digest.of(into_block_ids))
        return FetchReport(
            num_bytes=len(into_block_ids) * self.pool[0].nbytes,
            num_descriptors=len(ticket.run_lengths),
            wait_ms=(begun - called) * 1e3,
            read_ms=(landed - begun) * 1e3,
            verify_ms=(time.perf_counter() - landed) * 1e3,
        )

    def _compute_event(self) -> torch.cuda.Event | None:
        """Marks what the engine has given the GPU to do so far."""
        if not self.pool.is_cuda:
            return None
        stream = self._compute_stream or torch.cuda.default_stream(self.pool.device)
        event: torch.cuda.Event = stream.record_event()
        return event

    @contextmanager
    def _on_stream_after(self, event: torch.cuda.Event | None) -> Iterator[None]:
        if event is None or self._stream is None:
            yield
            return
        self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            yield


def _get_into(ref: ray.ObjectRef[Any], views: list[torch.Tensor], timeout_s: float) -> None:
    """Read what ref stands for into views, all of it or TransferFailed."""
    failure = None
    try:
        ray.experimental.set_target_for_ref(ref, views)
        landed = ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        failure = TransferFailed(Cause.TIMEOUT, f"not read within {timeout_s:.1f} s", must_quarantine=True)
    except RayError as error:
        # Of several descriptors one can fail while others are still being read.
        failure = TransferFailed(Cause.SENDER_LOST, type(error).__name__, must_quarantine=True)
    except ValueError as error:
        failure = TransferFailed(Cause.LAYOUT, str(error))
    if failure is not None:
        raise failure  # outside of the handlers: Ray's error, and the transfer its frames hold, end here
    # Ray holds the targets weakly and, once one is gone, silently allocates its own.
    if [tensor.data_ptr() for tensor in landed] != [view.data_ptr() for view in views]:
        raise TransferFailed(Cause.MISPLACED, "the blocks did not land in the pool")


def _forget_borrowed(ref: object) -> None:
    """Drop what Ray keeps for ever about each reference that a process has received (Ray issue 57962)."""
    manager = getattr(ray._private.worker.global_worker, "rdt_manager", None)
    entries, lock = getattr(manager, "_managed_rdt_metadata", None), getattr(manager, "_lock", None)
    if isinstance(ref, ray.ObjectRef) and isinstance(entries, dict) and lock is not None:
        with lock:
            entries.pop(ref.hex(), None)
