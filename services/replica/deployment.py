"""What the Serve adapters of prefill and decode share: streams that lend blocks, and calls to one certain replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from ray.exceptions import RayError, TaskCancelledError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from services.common.errors import AntiphonError, Unavailable
from services.common.settings import Settings
from services.engine.engine import Engine
from services.replica.handover import HistoryOffer, HistoryRequest
from services.replica.runtime import serve_replica_id_of
from services.transfer.base import Identity, Transfer
from services.transfer.rdt import RdtTransfer

log = logging.getLogger(__name__)

_PIN = "replica:"


class PinnedRouter(RequestRouter):
    """Sends a call with session_id `replica:<id>` to that replica, every other to whichever is free.

    Where the replica is gone the call goes to another one, which will know that it is not meant: better than waiting.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See RequestRouter."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # between tries; without it Serve spins
        pin = pending_request.metadata.session_id
        if not pin.startswith(_PIN):
            return [candidate_replicas]
        name = pin.removeprefix(_PIN)
        pinned = [each for each in candidate_replicas if each.replica_id.unique_id == name]
        return [pinned or candidate_replicas]


class HistoryHandle:
    """Implements HistoryClient over the handle of the decode deployment (get_handle: called at the first use).

    timeout_s: most that a holder may take to publish.
    """

    def __init__(self, get_handle: Callable[[], DeploymentHandle[Any]], timeout_s: float) -> None:
        self._get_handle = get_handle
        self._timeout_s = timeout_s
        self._handle: DeploymentHandle[Any] | None = None

    @asynccontextmanager
    async def history(self, request: HistoryRequest) -> AsyncIterator[HistoryOffer]:
        """See HistoryClient."""
        if self._handle is None:
            self._handle = self._get_handle()
        pin = pin_of(request.holder.replica_id)
        handle = self._handle.options(stream=True, method_name="history", session_id=pin, _by_reference=True)
        async with replica_stream(handle, request) as responses:
            offer: HistoryOffer = await next_item(responses, self._timeout_s)
            yield offer


def pin_of(replica_id: str) -> str:
    """The session_id of a handle whose calls go to this replica (a name in the registry)."""
    return f"{_PIN}{serve_replica_id_of(replica_id)}"


async def replica_call(response: DeploymentResponse[Any], timeout_s: float) -> Any:
    """What a replica answers. Raises Unavailable if it is lost, has failed or does not answer within timeout_s."""
    try:
        async with asyncio.timeout(timeout_s):
            return await response
    except TimeoutError as error:
        response.cancel()  # type: ignore[no-untyped-call]
        raise Unavailable("a replica did not answer in time") from error
    except (RayError, RayServeException, TaskCancelledError) as error:
        log.warning("a call to a replica failed", extra={"reason": type(error).__name__})
        raise Unavailable("a replica was lost or has failed") from error


@asynccontextmanager
async def replica_stream(
    handle: DeploymentHandle[Any], request: object
) -> AsyncIterator[DeploymentResponseGenerator[Any]]:
    """The items that the method of a handle (with stream=True) sends; leaving the context ends the call."""
    responses = handle.remote(request)
    assert isinstance(responses, DeploymentResponseGenerator)
    try:
        yield responses
    finally:
        responses.cancel()  # type: ignore[no-untyped-call]


async def next_item(responses: DeploymentResponseGenerator[Any], timeout_s: float | None = None) -> Any:
    """The next item of a replica's stream; an AntiphonError that it sends is raised.

    Raises Unavailable if the replica is lost, has failed, or sends nothing within timeout_s.
    """
    try:
        async with asyncio.timeout(timeout_s):
            item = await anext(responses)
    except TimeoutError as error:
        raise Unavailable("a replica did not answer in time") from error
    except StopAsyncIteration as error:
        raise Unavailable("a replica ended its stream early") from error
    except (RayError, RayServeException, TaskCancelledError) as error:
        log.warning("a call to a replica failed", extra={"reason": type(error).__name__})
        raise Unavailable("a replica was lost or has failed") from error
    if isinstance(item, AntiphonError):
        raise item
    return item


def rdt_transfer(settings: Settings) -> Callable[[Engine, Identity], Any]:
    """Makes the transfer of a replica, its pool registered."""

    async def make(engine: Engine, identity: Identity) -> Transfer:
        transfer = RdtTransfer(
            engine.kv_cache.pool,
            model=engine.layout.fingerprint,
            identity=identity,
            ttl_s=settings.transfer.lease_ttl_s,
            fetch_timeout_s=settings.transfer.fetch_timeout_s,
            progress_pause_s=settings.transfer.progress_pause_s,
        )
        await transfer.start()
        return transfer

    return make
